"""The rules that are checked after each pass: what they refuse, and what they say of it."""

from pathlib import Path

import pytest
import torch
from around import linear, matrix
from torch.fx import symbolic_trace
from traced import trace

from quartet.extend import Kernel, register_kernel, register_pass, unregister_kernel, unregister_pass
from quartet.lowering import ir
from quartet.lowering.ir.ops import fused
from quartet.passes import pipeline
from quartet.passes.compilation import Compilation
from quartet.passes.sites import Quantized
from quartet.passes.state import State
from quartet.passes.verify import SPECIFICATION, BrokenGraph, Rules, table
from quartet.policy import Policy

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture
def state():
    return State(symbolic_trace(lambda x: x), Compilation(Policy("fp8")))


def put(state, op, *arguments):
    x = next(iter(state.gm.graph.nodes))
    with state.gm.graph.inserting_after(x):
        node = state.gm.graph.call_function(op, (x, *arguments))
    node.meta.update(val=torch.empty(2, 32), partitioner_tag="is_forward")


def test_the_page_has_the_specification():
    made = table()
    assert made in PAGE.read_text(encoding="utf-8"), f"docs/architecture.md has another specification than\n{made}"


def test_the_specification_is_in_the_order_of_the_passes():
    assert list(SPECIFICATION) == [name for name in pipeline.NAMES if name in SPECIFICATION]


@pytest.mark.parametrize(("op", "arguments", "late", "first"), [
    (ir.HADAMARD, (32, None, False, torch.float32), "find_matmuls", "rotate"),
    (ir.AMAX, (), "plan", "quantize"),
    (fused.UNROTATE, (None, 32, None, 1.0, 32, torch.float32), "save", "lower"),
], ids=lambda value: getattr(value, "__name__", None))
def test_no_op_stands_before_its_time(state, op, arguments, late, first):
    rules = Rules(state)
    rules.check(late)
    put(state, op, *arguments)
    with pytest.raises(BrokenGraph, match=f"after pass '{late}', node .*an op stands where SPECIFICATION.* has it"):
        rules.check(late)
    rules.check(first)


def test_what_stood_in_the_graph_may_stay(state):
    put(state, ir.AMAX)
    Rules(state).check("tag")


def test_what_an_evaluation_captures_carries_no_tags(state):
    put(state, ir.AMAX)
    state.gm.graph.find_nodes(op="call_function", target=ir.AMAX)[0].meta.pop("partitioner_tag")
    rules = Rules(state)
    put(state, ir.AMAX)
    rules.check("tag")


def test_what_a_users_pass_brings_may_stay(state):
    rules = Rules(state)
    put(state, ir.AMAX)
    rules.check("mine", registered=True)
    rules.check("find_matmuls")


def test_a_kernel_may_leave_no_product_that_fell_to_it():
    register_kernel(Kernel("lazy", "leaves all as it is", lambda *asked: None, lambda graph, gemms, accepts: None), "cpp")
    try:
        with pytest.raises(Exception, match="(?s)BrokenGraph.*after pass 'lower'.*scaled_mm.*'lazy' has left this"):
            trace("cpu", linear(), matrix(8, 32), policy="quartet")
    finally:
        unregister_kernel("lazy")


def test_a_node_between_a_transform_and_its_quantiser_is_refused_with_a_remedy():
    def copied(stage):
        for site in stage.at(Quantized):
            for e in {stage.current(gemm.a) for gemm in site.gemms.values()}:
                build = stage.build(before=min(e.users))
                stage.replace(e, build(torch.ops.aten.clone.default, e))

    remedy = r"(?s)BrokenGraph.*after pass 'copied'.*to come before 'rotate', register_pass\(…, after=\"plan\"\)"
    register_pass(copied)
    try:
        trace("cpu", linear(), matrix(8, 32), policy="mxfp8")  # not rotated
        with pytest.raises(Exception, match=remedy):
            trace("cpu", linear(), matrix(8, 32), policy="quartet")
    finally:
        unregister_pass("copied")
