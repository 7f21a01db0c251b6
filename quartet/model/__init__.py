"""What is known of a user's model as a whole: names, tokens it was trained with, what its graphs have shown."""
