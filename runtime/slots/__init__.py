"""State that belongs to a model and is in no ``state_dict``: histories, averages, kept codes."""
