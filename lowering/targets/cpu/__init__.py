"""Fused C++ quantisers on a CPU."""
