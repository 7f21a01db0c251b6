"""Quantisers to codes of one byte, FP8 and INT8, as Triton kernels."""
