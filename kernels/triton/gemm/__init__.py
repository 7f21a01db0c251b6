"""Products that Triton multiplies itself."""
