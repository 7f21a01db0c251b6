"""Quantisers that Inductor generates for a GPU: every bit as the reference's on the same device."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_expected as expected  # noqa: E402

from quartet.lowering.targets import inductor  # noqa: E402

pytestmark = pytest.mark.gpu
SPECS = ("e4m3/32 e8m0 ceil nearest", "e5m2/32 e8m0 floor nearest", "e4m3/128 fp32 amax_pow2 nearest",
         "e4m3/128x128 fp32 amax_pow2 nearest", "int8/row fp32 amax nearest", "e4m3/row fp32 amax_pow2 nearest",
         "e4m3/16 fp32 amax nearest")


@pytest.fixture(autouse=True)
def registered():
    inductor.register()


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("shape", ((256, 512), (100, 300)))
@pytest.mark.parametrize("spec", SPECS)
def test_generated_quantisers(spec, shape, turned, device):
    x = expected.data(*shape, torch.bfloat16, device)
    x[3, 5], x[7, 9] = float("nan"), float("inf")

    def quantize(t):
        return torch.ops.quartet.quantize(t.t() if turned else t, spec, None, 0)

    for got, want in zip(torch.compile(quantize, dynamic=False)(x)[:2], quantize(x)[:2], strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
        nan = want.isnan() if want.is_floating_point() else torch.zeros_like(want, dtype=torch.bool)
        assert not got.is_floating_point() or torch.equal(got.isnan(), nan)
        bits = [t.view({1: torch.uint8, 4: torch.int32}[t.element_size()]).masked_fill(nan, 0) for t in (got, want)]
        assert torch.equal(*bits), f"{int((bits[0] != bits[1]).sum())} of {nan.numel()} differ"
