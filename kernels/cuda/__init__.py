"""CUDA C++ quantisers for Hopper, compiled by nvcc once a machine; the Triton kernels serve what they do not take."""
