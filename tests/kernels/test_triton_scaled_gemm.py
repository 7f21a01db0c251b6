"""The FP4 product in Triton: its numbers in the interpreter, its instructions for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import triton_offline  # noqa: E402

from quartet.kernels.triton.gemm import scaled_gemm  # noqa: E402

INTERPRETED = """
import torch
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton.gemm import scaled_gemm

torch.manual_seed(0)
spec = QuantSpec.parse("e2m1/32 e8m0 ceil nearest")
for m, n, k in ((5, 7, 32), (130, 129, 160), (128, 128, 256), (33, 200, 96), (1, 1, 4096)):
    a, b = torch.randn(m, k) * 2.0 ** torch.randint(-9, 9, (m, 1)), torch.randn(n, k)
    (ac, a_scales, _), (bc, b_scales, _) = reference.quantize(a, spec), reference.quantize(b, spec)
    want = reference.scaled_mm(ac, a_scales, bc, b_scales, spec, spec, torch.float32) * 1.75
    got = scaled_gemm.gemm(ac, reference.swizzle_scales(a_scales), bc, reference.swizzle_scales(b_scales), 1.75,
                           torch.float32)
    distance = ((got - want).norm() / want.norm()).item()
    assert distance < 1e-6, (m, n, k, distance)
nan = a_scales.clone()
nan[0, 3] = 255
got = scaled_gemm.gemm(ac, reference.swizzle_scales(nan), bc, reference.swizzle_scales(b_scales), 1.0, torch.float32)
assert got.isnan().all()
print("right")
"""
BYTES = torch.zeros(128, 64, dtype=torch.uint8)
SCALES = torch.zeros(512, dtype=torch.uint8)
MMA = {100: r"tcgen05\.mma\.\S*kind::mxf4\S*block_scale", 103: r"tcgen05\.mma\.\S*kind::mxf4\S*block_scale",
       120: r"mma\.sync\.\S*kind::mxf4\S*block_scale\S*e2m1\.e2m1\.f32\.ue8m0",
       121: r"mma\.sync\.\S*kind::mxf4\S*block_scale\S*e2m1\.e2m1\.f32\.ue8m0"}


def test_the_product_is_the_references():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize("capability", MMA)
def test_it_compiles_to_the_block_scaled_instruction(capability):
    (launch,) = triton_offline.launches(lambda: scaled_gemm.gemm(BYTES, SCALES, BYTES, SCALES, 1.0, torch.bfloat16))
    compiled, ptx = triton_offline.compile_with_ptx(launch, capability)
    assert re.search(MMA[capability], ptx), f"no block-scaled product in the PTX for {capability}"
    assert compiled.local == compiled.stack == 0


@pytest.mark.parametrize("arguments, message", [
    ((BYTES, SCALES[1:], BYTES, SCALES), "a \\[128, 64\\] with 511 of 512 scales"),
    ((BYTES, SCALES, BYTES[:, :32], SCALES), "b \\[128, 32\\]"),
    ((BYTES[:, :8], SCALES, BYTES[:, :8], SCALES), "K a multiple of 32"),
])
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scaled_gemm.gemm(*arguments, 1.0, torch.bfloat16)
