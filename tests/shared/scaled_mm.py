"""What this PyTorch's scaled products can do on a CPU, and look at."""

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode


def rows_run_on_a_cpu():
    codes, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def fakes_have_scales_checked():
    """Whether a fake tensor of a GPU is refused as a scale that it can not be; PyTorch 2.15 looks at real ones only."""
    with FakeTensorMode():
        codes = torch.empty(128, 128, dtype=torch.float8_e4m3fn, device="cuda")
        three, whole = torch.empty(3, device="cuda"), F.ScalingType.TensorWise
        try:
            F.scaled_mm(codes, codes.t(), three, whole, three, whole)
        except (RuntimeError, ValueError):
            return True
    return False
