"""The slope of DGE and rounding toward a reference, against their formulas value by value."""

import math

import pytest
import torch

from quartet.kernels import reference
from quartet.kernels.reference.estimator import dge_slope
from quartet.kernels.reference.formats.elements import E2M1_VALUES
from quartet.kernels.reference.formats.grid import grid_cell
from quartet.kernels.reference.q_ema import toward
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops import weights as weight_ops

ROW = QuantSpec.parse("e2m1/row fp32 amax nearest")
SPECS = [QuantSpec.parse(text) for text in ("e2m1/32 e8m0 ceil nearest", "e2m1/16 e8m0 ceil nearest",
                                            "e2m1/32 e8m0 floor nearest")]


def slope(x):
    """The formula for one magnitude in units of its scale."""
    x = min(abs(x), 6.0)
    g, above = next((a, b) for a, b in zip(E2M1_VALUES, (*E2M1_VALUES[1:], 8.0), strict=True) if a <= x < b)
    u = abs(2 * (x - g) / (above - g) - 1)
    return 3.0 if u == 0 else min(u ** (1 / 5 - 1) / 5, 3.0)


def rounded(x, spec):
    codes, scales, _ = reference.quantize(x, spec)
    return reference.dequantize(codes, scales, spec)[:, : x.shape[1]]


def test_cells():
    a = torch.tensor([0.0, 0.1, 0.5, 0.75, 1.9999999, 2.0, 2.9999998, 3.0, 3.5, 4.0, 5.9999995, 6.0])
    index, g, delta = grid_cell(a)
    assert index.tolist() == [0, 0, 1, 1, 3, 4, 4, 5, 5, 6, 6, 7]
    assert g.tolist() == [E2M1_VALUES[int(i)] for i in index]
    assert delta.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slope_in_units_of_the_row(dtype):
    torch.manual_seed(0)
    w = (torch.randn(5, 37) * torch.tensor([1e-3, 1.0, 40.0, 0.0, 1.0])[:, None]).to(dtype)
    got = dge_slope(w, ROW)
    assert got.dtype is torch.float32 and got.shape == w.shape
    for i in range(5):
        top = w[i].abs().max().item() or 6.0
        expected = [slope(v * 6 / top) for v in w[i].tolist()]
        torch.testing.assert_close(got[i], torch.tensor(expected), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got[3], torch.full((37,), 0.2))


def test_slope_at_the_grid_and_between():
    x = torch.tensor([[6.0, -6.0, 0.0, 0.5, -1.5, 4.0, 0.25, -0.75, 1.25, 2.5, -3.5, 5.0]])
    got = dge_slope(x, ROW)
    torch.testing.assert_close(got[0, :6], torch.full((6,), 0.2))
    assert (got[0, 6:] == 3).all()
    quarter = dge_slope(torch.tensor([[6.0, 4.5, 5.5, -4.5]]), ROW)[0, 1:]
    torch.testing.assert_close(quarter, torch.full((3,), 0.5 ** -0.8 / 5))


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec.parse("e2m1/32 fp32 amax nearest")], ids=str)
def test_slope_under_the_scale_of_a_block(spec):
    torch.manual_seed(1)
    w = torch.randn(3, 70) * 4
    got = dge_slope(w, spec)
    codes, scales, _ = reference.quantize(w, spec)
    decoded = reference.e8m0_decode(scales) if spec.scale == "e8m0" else scales
    units = w / decoded.repeat_interleave(spec.block, 1)[:, :70]
    expected = torch.tensor([[slope(v) for v in row] for row in units.tolist()])
    near_the_middle = expected > 2
    torch.testing.assert_close(got[~near_the_middle], expected[~near_the_middle], rtol=1e-3, atol=1e-3)
    assert (got[near_the_middle] > 1.9).all()


def test_slope_integrates_to_the_step():
    """f' is the derivative of g + δ/2·(1 + sign(u)·|u|^(1/k)), whose rise over a cell is δ, but for the clip."""
    a = torch.linspace(4, 6, 200001, dtype=torch.float64)[:-1].float()
    got = dge_slope(torch.cat((torch.tensor([6.0]), a))[None], ROW)[0, 1:].double()
    u = 3.0 ** (1 / -0.8) * 5 ** (1 / -0.8)
    expected = 1 - u**0.2 + 3 * u
    assert got.mean().item() == pytest.approx(expected, rel=1e-3)


def test_slope_of_what_is_not_finite():
    got = dge_slope(torch.tensor([[1.0, math.nan], [1.0, 2.0]]), ROW)
    assert got[0].isnan().all() and got[1].isfinite().all()


def by_definition(x, ref, spec):
    """Element by element: the nearer of two neighbours in units of the scale."""
    _, scales, _ = reference.quantize(x, spec)
    decoded = reference.e8m0_decode(scales)
    out = torch.empty(x.shape)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            s = decoded[i, j // spec.block].item()
            value, aim = min(abs(x[i, j].item()) / s, 6.0), math.copysign(1, x[i, j].item()) * ref[i, j].item() / s
            low = max(v for v in E2M1_VALUES if v <= value)
            high = min(v for v in E2M1_VALUES if v >= value)
            even = low if E2M1_VALUES.index(low) % 2 == 0 else high
            near = low if abs(aim - low) < abs(aim - high) else high if abs(aim - high) < abs(aim - low) else even
            out[i, j] = math.copysign(near * s, x[i, j].item())
    return out


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_toward_by_definition(spec, dtype):
    torch.manual_seed(2)
    x = (torch.randn(4, 70) * torch.tensor([1e-2, 1, 30, 1])[:, None]).to(dtype)
    ref = x.float() + 0.3 * x.float().std(1, keepdim=True) * torch.randn(4, 70)
    got = toward(x, ref, spec)
    assert got.dtype is (torch.float32 if dtype is torch.float16 else dtype)
    assert torch.equal(got.float(), by_definition(x, ref, spec))
    assert (got.float() != rounded(x, spec)).float().mean() > 0.05
    assert torch.equal(rounded(got, spec), got.float()), "the quantiser keeps what lies on its grid"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_toward_itself_is_to_nearest(spec):
    torch.manual_seed(3)
    x = torch.randn(8, 96)
    x[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # ties
    x[1, :32] = 0
    for ref in (x, torch.full_like(x, math.nan)):
        assert torch.equal(toward(x, ref, spec), rounded(x, spec))


def test_toward_takes_only_neighbours():
    x = torch.tensor([[6.0, 2.1, 2.9, -0.1, 3.0] + [0.0] * 27])
    for aim in (-100.0, 100.0):
        got = toward(x, torch.full_like(x, aim), SPECS[0])[0, :5].tolist()
        assert got == ([6, 2, 2, -0.5, 3] if aim < 0 else [6, 3, 3, 0, 3])
    assert toward(x, torch.full_like(x, 2.5), SPECS[0])[0, 1:3].tolist() == [2, 2], "a tie goes to the even code"


def test_a_block_that_is_not_finite_stays_visible():
    x = torch.randn(2, 64)
    x[0, 3], x[1, 40] = math.nan, math.inf
    got = rounded(toward(x, x, SPECS[0]), SPECS[0])
    assert got[0, :32].isnan().all() and got[0, 32:].isfinite().all()
    assert got[1, 32:].isnan().all() and got[1, :32].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_ops_and_their_fakes(dtype, transposed):
    x = torch.randn(37, 70, dtype=dtype)
    x = x.t() if transposed else x
    ref = torch.randn(x.shape)
    torch.library.opcheck(weight_ops.DGE, (x, str(ROW)), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(weight_ops.TOWARD, (x, ref, str(SPECS[0])), test_utils=("test_schema", "test_faketensor"))
