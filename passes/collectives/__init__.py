"""Quantised tensors on their way between ranks."""
