"""What a recipe is, what a policy has decided for a matmul, and the record of what became of it."""
