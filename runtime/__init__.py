"""What lives from step to step, and everything that PyTorch does not promise to keep."""
