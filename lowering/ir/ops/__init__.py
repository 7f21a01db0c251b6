"""The declarations of all ops but those of single targets, each on its reference."""
