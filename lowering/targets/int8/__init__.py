"""INT8 operands in integer arithmetic."""
