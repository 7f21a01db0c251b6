"""``quartet selftest``: what this machine's GPUs compute, compared with the reference."""
