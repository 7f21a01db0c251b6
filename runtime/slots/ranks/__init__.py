"""What ranks of a program have in common of what is remembered."""
