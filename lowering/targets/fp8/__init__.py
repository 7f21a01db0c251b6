"""FP8 operands with a scale a tensor or a row on FP8 tensor cores."""
