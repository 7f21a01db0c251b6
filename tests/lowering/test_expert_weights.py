"""FP8 experts whose products quantise the weights themselves: once an optimizer step, and to the same numbers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from experts_on_hopper import COUNTS, ENDS, TOKENS, on, scaled_grouped_mm
from torch import nn
from traced import carry_out, options_for, targets, trace

from quartet.backend import compile_graph
from quartet.lowering import ir
from quartet.lowering.ir.ops import experts as ops
from quartet.lowering.ir.ops import fp8 as fp8_ops
from quartet.lowering.ir.ops import grouped as grouped_ops
from quartet.runtime.capture import Capture
from quartet.runtime.slots.weights import REUSED

BF16, FP8 = torch.bfloat16, on("grouped", "fp8")


@pytest.fixture(autouse=True)
def written_down():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_grouped_mm", scaled_grouped_mm, "CPU")
    yield
    library._destroy()


class Experts(nn.Module):
    """gate and up in one parameter, stored ``[E, out, in]``; down stored ``[E, in, out]``."""

    def __init__(self, hidden=40, width=72, dtype=BF16):
        super().__init__()
        self.up = nn.Parameter((torch.randn(len(COUNTS), 2 * hidden, width) / 8).to(dtype))
        self.down = nn.Parameter((torch.randn(len(COUNTS), hidden, width) / 8).to(dtype))

    def forward(self, x, ends):
        gate, up = F.grouped_mm(x, self.up.transpose(1, 2).to(BF16), offs=ends).chunk(2, 1)
        return F.grouped_mm(F.silu(gate) * up, self.down.to(BF16), offs=ends)


def tokens(seed=0):
    return torch.randn(TOKENS, 72, generator=torch.Generator().manual_seed(seed)).to(BF16).requires_grad_()


def orientations(gm):
    return sorted(node.args[7] for node in gm.graph.find_nodes(op="call_function", target=ops.MM))


def test_each_direction_reads_the_weights_and_no_codes_of_theirs_are_kept():
    forward, backward = trace("sm_90", Experts(), tokens(), ENDS, policy=FP8)
    assert orientations(forward) == orientations(backward) == [False, True]
    assert targets(forward)[ops.AMAX] == 2 and not targets(backward)[ops.AMAX]
    for gm in (forward, backward):  # X of each, E of each: of what lies padded, and of what does not
        assert targets(gm)[fp8_ops.CAST_BY_ROWS] == targets(gm)[fp8_ops.CAST_ROWS] == 1
    (output,) = forward.graph.find_nodes(op="output")
    kept = [node.meta["val"] for node in output.args[0] if node.meta["val"].dtype is torch.float8_e4m3fn]
    assert sorted(value.shape[0] for value in kept) == [40, 72]  # of X alone, and its transpose
    assert not any(targets(gm)[fp8_ops.ROW_MAJOR] or targets(gm)[ir.QUANTIZE] for gm in (forward, backward))


@pytest.mark.parametrize("options", [{"reuse_weights": False}, {"disable_passes": ["lower"]}], ids=str)
def test_not_where_nothing_is_reused(options):
    forward, backward = trace("sm_90", Experts(), tokens(), ENDS, policy=FP8, **options)
    assert not targets(forward)[ops.MM] and not targets(backward)[ops.MM]


@pytest.mark.parametrize("recipe, dtype", [("fp8-rowwise", BF16), ("halo-fp8-1", BF16), ("fp8", torch.float32)])
def test_rows_rotations_and_casts_go_the_way_of_codes(recipe, dtype):
    forward, backward = trace("sm_90", Experts(dtype=dtype), tokens(), ENDS, policy=on("grouped", recipe))
    assert not targets(forward)[ops.MM] and not targets(backward)[ops.MM]


def test_weights_of_checkpointed_regions_go_the_way_of_codes():
    class Checkpointed(Experts):
        def forward(self, x, ends):
            return torch.utils.checkpoint.checkpoint(super().forward, x, ends, use_reentrant=False)

    forward, backward = trace("sm_90", Checkpointed(), tokens(), ENDS, policy=FP8)
    assert not targets(forward)[ops.MM] and not targets(backward)[ops.MM]


@pytest.mark.parametrize("special", [None, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("hidden", [40, 48])
def test_the_numbers_are_those_of_codes(hidden, special):
    torch.manual_seed(2)
    model = Experts(hidden)
    with torch.no_grad():
        if special is not None:
            model.up[3] = special
    gradient = torch.randn(TOKENS, 72).to(BF16)
    run = partial(carry_out, "sm_90", model, tokens(), FP8, gradient, rest=(ENDS,))
    got, graphs = run()
    wanted, others = run(reuse_weights=False)
    assert [targets(gm)[ops.MM] for gm in (*graphs, *others)] == [2, 2, 0, 0]
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.view(torch.int16), w.view(torch.int16)) or torch.equal(g.isnan(), w.isnan()) \
            and torch.equal(g.nan_to_num(), w.nan_to_num())


@pytest.fixture
def made(monkeypatch):
    """What a CPU makes of weights, with the reuse that a GPU has: (orientation, shape) in order."""
    made = []

    def codes(w, multiplier, spec, turned):
        made.append((turned, tuple(w.shape)))
        return ops.codes_of(w, multiplier, spec, turned)

    library = torch.library.Library("quartet", "IMPL")
    library.impl("expert_mm", partial(ops.multiply_kept, codes), "CPU")
    library.impl("expert_amax", lambda w: REUSED.share(w, "amax", lambda: ops.largest_magnitude(w)).clone(), "CPU")
    yield made
    library._destroy()


def training(**options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, parsed, capture = Experts(), options_for("sm_90", FP8, **options), Capture()
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, parsed, inner_compile=capture))
    return model, compiled, torch.optim.SGD(model.parameters(), 0.1)


def accumulate(compiled, count=3):
    for seed in range(count):
        compiled(tokens(seed), ENDS).float().square().mean().backward()


def test_weights_are_quantised_once_a_step(made):
    runs = []
    for options in ({}, {"reuse_weights": False}):
        model, compiled, optimizer = training(**options)
        for step in range(3):
            made.clear()
            accumulate(compiled)
            if not options:  # the first step of an optimizer is not foreseen
                assert len(made) == (12 if step == 0 else 8 if step == 1 else 4)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert all(map(torch.equal, runs[0].parameters(), runs[1].parameters()))
    assert not made


def test_a_weight_that_changes_within_a_step_is_quantised_again(made):
    models = []
    for options in ({}, {"reuse_weights": False}):
        model, compiled, optimizer = training(**options)
        for _ in range(2):
            accumulate(compiled)
            optimizer.step()
        accumulate(compiled)
        made.clear()
        with torch.no_grad():
            model.up.mul_(-1.5)
        accumulate(compiled, 1)
        assert made == ([(False, (5, 80, 72)), (True, (5, 80, 72))] if not options else [])
        optimizer.step()
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_tokens_are_cast_where_they_lie():
    """No padded copy of X or of E is made, and tokens of no group have no part in the scale."""
    forward, backward = trace("sm_90", Experts(), tokens(), ENDS, policy=FP8)
    for gm in (forward, backward):
        assert not targets(gm)[grouped_ops.PAD_GROUPS]
        assert targets(gm)[fp8_ops.CAST_BY_ROWS] == targets(gm)[fp8_ops.CAST_ROWS] == 1  # what lies padded, or not
    model, x, gradient = Experts(), tokens().detach(), torch.randn(TOKENS, 72).to(BF16)
    results = []
    for behind in (0.0, 1e4, float("nan")):
        x[ENDS[-1]:], gradient[ENDS[-1]:] = behind, behind
        results.append(carry_out("sm_90", model, x, FP8, gradient, rest=(ENDS,))[0])
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))
