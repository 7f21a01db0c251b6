"""Weights that exist only as codes."""
