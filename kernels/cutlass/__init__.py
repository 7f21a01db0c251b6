"""Block-scaled GEMMs for Blackwell, generated from one CUTLASS template, compiled by nvcc and cached."""
