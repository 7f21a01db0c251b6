"""One folder a family of kernels: what it takes, and how it rewrites the products that it gets."""
