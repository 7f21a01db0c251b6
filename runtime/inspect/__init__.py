"""What a compiled graph tells of the numbers that run through it, and when it does."""
