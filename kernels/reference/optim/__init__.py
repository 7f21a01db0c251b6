"""Optimizer steps, their states, and weights that exist only as codes."""
