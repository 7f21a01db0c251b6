"""Quantisers, requantisers, folds and rotations."""
