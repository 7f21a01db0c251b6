"""Triton kernels of the quantised IR."""
