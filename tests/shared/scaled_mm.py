"""What this PyTorch's ``_scaled_mm`` can do on a CPU."""

import torch


def rows_run_on_a_cpu():
    codes, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
