"""Fused CPU kernels: one C++ source, compiled at first use, bit-equal to ``quartet.kernels.reference``."""
