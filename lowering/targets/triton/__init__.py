"""Triton quantisers, and FP8 tensor cores by an exact fold."""
