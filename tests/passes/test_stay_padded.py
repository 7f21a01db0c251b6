"""What stands between grouped products is computed of padded rows, to the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from around import around
from expecttest import assert_expected_inline
from experts_on_hopper import ENDS, TOKENS, on
from torch import nn
from traced import options_for, targets, trace

from quartet.backend import compile_graph
from quartet.lowering.ir.ops.grouped import CLEAR_ROWS, GATHER_ROWS, PAD_GROUPS
from quartet.runtime.capture import Capture

WIDTH, HIDDEN = 64, 48
BF16 = torch.bfloat16
OFF = {"disable_passes": ["stay_padded"]}


def weight(experts, *shape):
    return nn.Parameter((torch.randn(experts, *shape) / 8).to(BF16))


class Gated(nn.Module):
    """silu(gate) · up, times the token's share, and down."""

    def __init__(self):
        super().__init__()
        experts = len(ENDS)
        self.gate, self.up = weight(experts, WIDTH, HIDDEN), weight(experts, WIDTH, HIDDEN)
        self.down = weight(experts, HIDDEN, WIDTH)

    def forward(self, x, ends, share):
        gate, up = F.grouped_mm(x, self.gate, offs=ends), F.grouped_mm(x, self.up, offs=ends)
        return F.grouped_mm(F.silu(gate) * up * share[:, None], self.down, offs=ends)


class Fused(Gated):
    """gate and up in one product; exp, which makes 1 of the zeros in padded rows."""

    def __init__(self):
        super().__init__()
        self.both = weight(len(ENDS), WIDTH, 2 * HIDDEN)
        self.scale = nn.Parameter(torch.rand(HIDDEN).to(BF16))

    def forward(self, x, ends, share):
        gate, up = F.grouped_mm(x, self.both, offs=ends).chunk(2, 1)
        return F.grouped_mm(torch.exp(gate) * up * self.scale + share[:, None], self.down, offs=ends)


class Apart(Gated):
    """Rows that are mixed, a sum over the features, and other tokens than the products'."""

    def forward(self, x, ends, share):
        gate = F.grouped_mm(x, self.gate, offs=ends)
        return F.grouped_mm(gate.roll(1, 0) + gate.softmax(-1) + x[:, :HIDDEN], self.down, offs=ends)


class Twice(Gated):
    """The result of one product as the other's X, in other groups."""

    def forward(self, x, ends, share):
        return F.grouped_mm(F.grouped_mm(x, self.gate, offs=ends), self.down, offs=ends.clamp(max=40))


def data(tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, share = torch.randn(tokens, WIDTH, generator=generator), torch.rand(tokens, generator=generator)
    return x.to(BF16).requires_grad_(), share.to(BF16).requires_grad_()


def moved(model, recipe="quartet", **options):
    """How many rows are padded, taken out and cleared in forward and backward."""
    x, share = data()
    graphs = trace("sm_90", model, x, ENDS, share, policy=on("grouped", recipe), **options)
    return [tuple(targets(gm)[op] for op in (PAD_GROUPS, GATHER_ROWS, CLEAR_ROWS)) for gm in graphs]


class Plain(nn.Module):
    """relu between two products."""

    def __init__(self):
        super().__init__()
        self.up, self.down = weight(len(ENDS), WIDTH, HIDDEN), weight(len(ENDS), HIDDEN, WIDTH)

    def forward(self, x, ends):
        return F.grouped_mm(F.relu(F.grouped_mm(x, self.up, offs=ends)), self.down, offs=ends)


def test_the_rows_of_tokens_are_cleared_of_the_others_and_not_moved():
    change = around("stay_padded", Plain(), data()[0], ENDS, policy=on("grouped", "fp8-rowwise"))
    assert_expected_inline(change.text, """\
  %0 = %1[1] : i32[144]
  %2 = %1[2] : i32[70]
  %3 = scaled_grouped_mm(%4, %5, %6, %7, 'e4m3/row fp32 amax_pow2 nearest', 'e4m3/row fp32 amax_pow2 nearest', bf16, %8, False) : bf16[144, 48]
  %9 = scaled_grouped_mm(%10, %11, %12, %13, 'e4m3/row fp32 amax_pow2 nearest', 'e4m3/row fp32 amax_pow2 nearest', bf16, %8, False) : bf16[144, 48] | bwd!
  %14 = scalar_tensor(0, dtype=bf16, layout=torch.strided, device=cpu) : bf16[] | bwd
- %15 = gather_rows(%3, %2) : bf16[70, 48]
- %16 = relu(%15) : bf16[70, 48]
- %17 = alias(%16) : bf16[70, 48]
- %18 = pad_groups(%16, %0) : bf16[144, 48] | prefer_recompute
+ %19 = relu(%3) : bf16[144, 48]
+ %20 = alias(%19) : bf16[144, 48]
+ %21 = clear_rows(%19, %0) : bf16[144, 48] | prefer_recompute
- %22 = quantize(%18, 'e4m3/row fp32 amax_pow2 nearest', None, 0) : (f8e4m3[144, 48], f32[144, 1], u8[0])
+ %22 = quantize(%21, 'e4m3/row fp32 amax_pow2 nearest', None, 0) : (f8e4m3[144, 48], f32[144, 1], u8[0])
- %23 = permute(%18, [1, 0]) : bf16[48, 144] | bwd!
+ %23 = permute(%21, [1, 0]) : bf16[48, 144] | bwd!
- %24 = gather_rows(%9, %2) : bf16[70, 48] | bwd!
- %25 = alias(%17) : bf16[70, 48] | bwd
- %26 = le(%25, 0) : b8[70, 48] | bwd
+ %27 = alias(%20) : bf16[144, 48] | bwd!
+ %28 = le(%27, 0) : b8[144, 48] | bwd!
- %29 = where(%26, %14, %24) : bf16[70, 48] | bwd
- %30 = pad_groups(%29, %0) : bf16[144, 48] | bwd!
+ %31 = where(%28, %14, %9) : bf16[144, 48] | bwd!
+ %32 = clear_rows(%31, %0) : bf16[144, 48] | bwd!
- %33 = permute(%30, [1, 0]) : bf16[48, 144] | bwd!
+ %33 = permute(%32, [1, 0]) : bf16[48, 144] | bwd!
- %34 = quantize(%30, 'e4m3/row fp32 amax_pow2 nearest', None, 0) : (f8e4m3[144, 48], f32[144, 1], u8[0]) | bwd!
+ %34 = quantize(%32, 'e4m3/row fp32 amax_pow2 nearest', None, 0) : (f8e4m3[144, 48], f32[144, 1], u8[0]) | bwd!""")


@pytest.mark.parametrize("recipe, before, after", [("fp8-rowwise", (5, 3), 2), ("quartet", (3, 2), 1)])
def test_rows_are_padded_once_and_taken_out_once(recipe, before, after):
    """In forward X is padded, and the result and the shares are moved. In backward the gradient is padded, by
    fp8-rowwise X once more, and the gradients of X and of the shares are taken out."""
    assert moved(Gated(), recipe, **OFF) == [(2, 3, 0), (*before, 0)]
    forward, (padded, _, cleared) = moved(Gated(), recipe)
    assert forward == (1, 2, 1) and padded == after and cleared == before[0] - after


def test_parts_of_rows_stay_padded():
    assert [counts[0] for counts in moved(Fused())] == [1, 1]


@pytest.mark.parametrize("form", [Apart, Twice])
def test_what_mixes_rows_or_has_other_groups_is_padded_again(form):
    assert moved(form()) == moved(form(), **OFF)


def results(model, ends, x, share, recipe, **options):
    torch._dynamo.reset()
    model.zero_grad()
    x, share = (t.detach().clone().requires_grad_() for t in (x, share))
    parsed, capture = options_for("cpu", on("grouped", recipe), **options), Capture()
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, parsed, inner_compile=capture))
    torch.manual_seed(1)
    out = compiled(x, ends, share)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(BF16))
    cleared = sum(targets(gm)[CLEAR_ROWS] for gm in capture.graphs)
    return cleared, [out.detach(), *(t.grad for t in (x, share, *model.parameters()) if t.grad is not None)]


GROUPS = {  # the first with an empty one, and tokens that are in none
    "ragged": ENDS, "all in one": torch.tensor([0, 70, 70, 70, 70]),
    "one token": torch.tensor([0, 0, 1, 1, 1]), "none": torch.zeros(5)}


@pytest.mark.parametrize("form, recipe, groups", [
    *((form, recipe, "ragged") for form in (Gated, Fused) for recipe in ("fp8", "fp8-rowwise", "quartet")),
    *((Fused, "quartet", groups) for groups in GROUPS if groups != "ragged")])
def test_the_numbers_are_those_of_rows_padded_again(form, recipe, groups):
    torch.manual_seed(0)
    model, ends = form(), GROUPS[groups].to(torch.int32)
    cleared, got = results(model, ends, *data(), recipe)
    none, wanted = results(model, ends, *data(), recipe, **OFF)
    assert cleared and not none
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("recipe", ["fp8-rowwise", "quartet"])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_was(special, recipe):
    """In a token of a group, and in one of none."""
    model, (x, share) = Fused(), data()
    with torch.no_grad():
        x[7], x[-1] = special, special
    got, wanted = (results(model, ENDS, x, share, recipe, **options)[1] for options in ({}, OFF))
    assert got[0][7].isnan().all() and got[0][:5].isfinite().all() and not got[0][-1].any()
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.isnan(), w.isnan()) and torch.equal(g.nan_to_num(), w.nan_to_num())
