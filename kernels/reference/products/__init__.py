"""Products of quantised operands that are more than one matrix product."""
