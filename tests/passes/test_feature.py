"""A recipe that says what no recipe could say before: a field, a function of the reference and a pass, nothing else.

    damping   gW = d · (Eᵀ·X)
"""

from dataclasses import dataclass, fields

import pytest
import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from traced import carry_out

from quartet import explain
from quartet.kernels.spec import SpecError
from quartet.lowering.ir.graph import aten, editing
from quartet.lowering.recipe.types import Recipe
from quartet.passes import pipeline
from quartet.passes.graph_pass import graph_pass, in_order, table
from quartet.passes.rewriting import rewrite
from quartet.passes.sites import Planned
from quartet.policy import Policy, toml
from quartet.recipes import recipes


@dataclass(frozen=True)
class Damped(Recipe):
    """``Recipe`` with a field more: the one place that says which values it has."""

    damping: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise SpecError(f"damping by {self.damping} is not possible; use a factor above 0, up to 1")


def damped(gradient, factor):
    """What ``kernels/reference`` would have."""
    return gradient * factor


@graph_pass(reads=Planned, writes=Planned, optional=True, summary="W's gradient times a factor")
def damp(state):
    with editing(state.gm):
        for site in state.at(Planned):
            factor = getattr(site.recipe, "damping", 1.0)
            if factor != 1 and site.active("wgrad"):
                made = rewrite(state, site, "wgrad", lambda build, gw, f=factor: build(aten.mul.Tensor, gw, f))
                state.advance(made.remark("wgrad", f"times {factor}"))


def recipe(factor):
    known = {f.name: getattr(recipes()["mxfp8"], f.name) for f in fields(Recipe)}
    return Damped(**{**known, "name": "damped", "damping": factor})


def policy(factor):
    """On layers of any size."""
    return Policy(recipe(factor)).on("linear", recipe(factor))


@pytest.fixture(autouse=True)
def a_pass_more(monkeypatch):
    at = pipeline.NAMES.index("rotate")
    passes = in_order(*pipeline.PASSES[:at], damp, *pipeline.PASSES[at:])
    monkeypatch.setattr(pipeline, "PASSES", passes)
    monkeypatch.setattr(pipeline, "NAMES", tuple(one.name for one in passes))
    monkeypatch.setattr(pipeline, "OPTIONAL", tuple(one.name for one in passes if one.optional))


def test_the_field_is_checked_and_written_and_in_the_key():
    with pytest.raises(SpecError, match="damping by 0 is not possible; use a factor above 0"):
        recipe(0)
    assert toml.recipe_to_dict(recipe(0.5))["damping"] == 0.5 and "damping" not in toml.recipe_to_dict(recipe(1.0))
    assert len({Policy(recipe(factor)).key() for factor in (1.0, 0.5, 0.25)}) == 3


def test_the_field_is_still_there_when_roles_are_decided_apart():
    effective = Policy(recipe(0.5)).on("0", "fp8", role="dgrad").resolve("linear", "0", 8, 64, 32).effective
    assert effective.damping == 0.5 and effective.name == "damped+fp8" and effective.saved is None


def test_the_pass_is_in_the_table_and_may_be_left_out():
    assert "| `damp` | planned → planned | yes | W's gradient times a factor |" in table(pipeline.PASSES)
    change = around(damp.name, linear(), matrix(8, 32), policy=policy(0.5), disable_passes=["damp"])
    assert change.after is None


def test_the_graph():
    assert_expected_inline(around(damp.name, linear(), matrix(8, 32, grad=False), policy=policy(0.5)).text, """\
- %0 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %1 = mm(%0, x) : bf16[64, 32] | bwd
- %2 = permute(%1, [1, 0]) : bf16[32, 64] | bwd
+ %3 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %4 = mm(%3, x) : bf16[64, 32] | bwd!
+ %5 = mul(%4, 0.5) : bf16[64, 32] | bwd!
+ %2 = permute(%5, [1, 0]) : bf16[32, 64] | bwd""")


def test_the_numbers_are_the_references():
    model, x, e = linear(), *(torch.randn(8, width, dtype=torch.bfloat16) for width in (32, 64))
    got, plain = (carry_out("cpu", model, x, policy(factor), e)[0] for factor in (0.5, 1.0))
    wanted = [damped(t, 0.5) if t.shape == (64, 32) else t for t in plain]
    assert [t.shape for t in got] == [(8, 64), (8, 32), (64, 32)] and all(map(torch.equal, got, wanted))


def test_the_report_says_so():
    for factor in (0.5, 1.0):
        report = str(explain(linear(), matrix(8, 32), options={"policy": policy(factor)}))
        assert ("times 0.5" in report) == (factor == 0.5)
