"""Find the matmuls of a graph and their gradients, in the one form that the other passes look for."""
