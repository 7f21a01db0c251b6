"""The NVFP4 quantisers on the device: every bit as the reference's, in both layouts of the scales."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_expected as expected  # noqa: E402
import two_level_cases as cases  # noqa: E402

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize("name, check, arguments", [(name, *case) for name, case in cases.cases()])
def test_cases_of_the_interpreter(name, check, arguments):
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    lines = check(*moved)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(512, 2048), (300, 4112), (129, 1200)])
@pytest.mark.parametrize("spec", cases.SPECS.values(), ids=cases.SPECS)
def test_large(spec, rows, cols, dtype):
    x = expected.data(rows, cols, dtype, "cuda")
    rotation = 16 if spec.rule == "amax" and not spec.tile else 0
    for given in (x, x.t()):
        lines = cases.check_quantize(given, spec, rotation, rotation > 0)
        assert not lines, "\n".join(lines)
    lines = cases.check_dequantize(x, spec, torch.bfloat16)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_axes_and_largest_magnitudes(dtype):
    x = expected.data(700, 1000, dtype, "cuda")
    lines = cases.check_both(x, cases.STOCHASTIC, 0, cases.STOCHASTIC, 16)
    for rotation in (16, 32, 128):
        lines += cases.check_amax(x, rotation, True) + cases.check_amax(x.t(), rotation, True)
        lines += cases.check_rotate(x, rotation, True) + cases.check_rotate(x.t(), rotation, False)
    assert not lines, "\n".join(lines)
