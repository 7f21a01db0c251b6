"""Numerics: quantiser specifications, the reference implementation, and kernels for each device."""
