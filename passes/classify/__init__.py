"""What a matmul is, and what of it a policy's default leaves alone: op class, gates, heads, masks, layers."""
