"""Experts in MXFP4 as compiled for Hopper, carried out on a CPU: the kernels in Triton's interpreter.

``TRITON_INTERPRET=1 python expert_cases.py`` prints a JSON line for each case: how far every expert's gradient is from
that of the reference, relative to its own size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "shared")]

import torch  # noqa: E402
from experts_on_hopper import COUNTS, ENDS, TOKENS, on, scaled_grouped_mm  # noqa: E402
from test_grouped_products import Experts  # noqa: E402
from traced import carry_out  # noqa: E402

from quartet.lowering.ir.ops import fused as cuda_ops  # noqa: E402

CASES = {"fourth expert 24 powers of two down": ("quartet", 24)}
KERNELS = {"cuda_quantize": cuda_ops._quantize, "cuda_quantize_both": cuda_ops._quantize_both,
           "cuda_requantize": cuda_ops._requantize, "cuda_fold": cuda_ops._fold,
           "dequantize_operand": cuda_ops._dequantize, "unrotate": cuda_ops._unrotate}


def gradients(recipe: str, down: int, **options: object) -> torch.Tensor:
    """``[experts, out, in]``."""
    torch.manual_seed(0)
    model, x, gradient = Experts(32, 32), torch.randn(TOKENS, 32).bfloat16(), torch.randn(TOKENS, 32)
    gradient[ENDS[2]:ENDS[3]] *= 2.0**-down
    (_, _, found), _ = carry_out("sm_90", model, x, on("grouped", recipe), gradient.bfloat16(), rest=(ENDS,), **options)
    return found.float()


def main() -> None:
    libraries = [torch.library.Library(name, "IMPL") for name in ("aten", "quartet")]
    libraries[0].impl("_scaled_grouped_mm", scaled_grouped_mm, "CPU")
    for name, kernel in KERNELS.items():
        libraries[1].impl(name, kernel, "CPU")
    for name, case in CASES.items():
        got, wanted = gradients(*case), gradients(*case, disable_kernels=["triton-fp8", "triton"])
        size = wanted.flatten(1).norm(dim=1)
        errors = (got - wanted).flatten(1).norm(dim=1) / size.clamp(min=torch.finfo(torch.float32).tiny)
        print(json.dumps({"case": name, "errors": errors.tolist(), "empty": [not count for count in COUNTS]}))


if __name__ == "__main__":
    main()
