"""What forward leaves to backward, and in which format."""
