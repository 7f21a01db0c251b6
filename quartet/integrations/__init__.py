"""What trainers are told of a model's state that is in no ``state_dict``: a module a trainer, which imports it."""
