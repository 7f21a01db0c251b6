"""What passes declare: an order that holds, sites that are left as declared, the table of ``docs/architecture.md``; and
that each has a graph of its own in this folder."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from around import around, linear, matrix
from torch.fx import symbolic_trace

from quartet.passes import pipeline
from quartet.passes.compilation import Compilation
from quartet.passes.graph_pass import GraphPass, PassOrderError, graph_pass, in_order, table
from quartet.passes.sites import Found, Planned, Product, Quantized, Rotated
from quartet.passes.state import State
from quartet.policy import Policy

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
SHOWN = set(re.findall(r'around\("(\w+)"', "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))))


@graph_pass(writes=Found)
def find(state):
    x, y, out = (node for node in state.gm.graph.nodes if node.op != "output")
    state.advance(Found(index=0, fqn="a", op_class="bmm", x=(x, False), w=(y, True), m=2, n=2, k=2,
                        dtype=torch.float32, forward=Product(out, flipped=False)))


@graph_pass(reads=Found)
def look(state):
    assert [site.fqn for site in state.at(Found)] == ["a"]


@graph_pass(reads=Found, writes=Planned, optional=True)
def plan(state): ...


@graph_pass(reads=Planned, writes=Rotated)
def rotate(state): ...


def renaming(writes: type[Found] | None) -> GraphPass:
    @graph_pass(reads=Found, writes=writes)
    def rename(state):
        state.advance(replace(state.site(0), fqn="b"))

    return rename


@pytest.fixture
def state():
    return State(symbolic_trace(lambda x, y: x @ y), Compilation(Policy("fp8")))


def test_the_page_has_the_table():
    made = table(pipeline.PASSES)
    assert made in PAGE.read_text(encoding="utf-8"), f"docs/architecture.md has another table of passes than\n{made}"


def test_every_phase_is_left_by_a_pass_that_always_runs():
    assert in_order(*pipeline.PASSES) == pipeline.PASSES
    assert {Found, Planned, Rotated, Quantized} <= {one.writes for one in pipeline.PASSES if not one.optional}


@pytest.mark.parametrize("missing", ["plan", "quantize"])
def test_a_phase_that_nobody_leaves_is_an_error(missing):
    left = [one for one in pipeline.PASSES if one.name != missing]
    with pytest.raises(PassOrderError, match="no pass before it that is always run leaves"):
        in_order(*left)


def test_a_pass_cannot_stand_before_what_it_takes():
    assert in_order(find, look) == (find, look)
    with pytest.raises(PassOrderError, match="'look' takes sites that are Found"):
        in_order(look, find)


def test_what_may_be_left_out_is_not_relied_on():
    with pytest.raises(PassOrderError, match="'rotate' takes sites that are Planned"):
        in_order(find, plan, rotate)
    assert in_order(find, replace(plan, optional=False), rotate)


def test_sites_are_left_as_declared(state):
    find(state)
    renaming(Found)(state)
    assert state.site(0).fqn == "b"
    with pytest.raises(PassOrderError, match="'rename' leaves a site as Found, which is not what it declares"):
        renaming(None)(state)


def test_a_site_is_frozen(state):
    find(state)
    look(state)
    with pytest.raises(AttributeError, match="cannot assign"):
        state.site(0).fqn = "b"


def test_every_pass_is_shown_and_nothing_else():
    assert set(pipeline.NAMES) == SHOWN


@pytest.mark.parametrize("name", pipeline.OPTIONAL)
def test_what_may_be_left_out_can_be(name):
    change = around(name, linear(), matrix(8, 32), disable_passes=[name])
    assert change.after is None and {record.recipe for record in change.records} == {"quartet"}
