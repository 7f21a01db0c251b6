"""Block-scaled products: CUTLASS, PyTorch's own, and Triton's."""
