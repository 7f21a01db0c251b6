"""Decide for every GEMM: quantised how and by which kernel, or left alone and why."""
