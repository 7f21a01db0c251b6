"""Typed views of nodes, and what may stand between a quantiser and the product that reads it."""

from dataclasses import fields
from functools import partial

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from traced import carry_out, linear, targets, trace

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, is_backward, parameters
from quartet.lowering.ir.operands import OPERANDS_KEY, ROWS, SCALED, TRANSPOSED, Product, Quantizer, quantizer_of
from quartet.lowering.ir.views import VIEWS, Dequantize, Hadamard, Quantize
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.lowering.targets.blackwell import ops as blackwell_ops
from quartet.passes import pipeline
from quartet.passes.graph_pass import graph_pass

aten, ops = torch.ops.aten, torch.ops.quartet
MX, TENSOR = "e2m1/32 e8m0 ceil nearest", "e4m3/tensor fp32 amax nearest"


@torch.library.custom_op("operands_test::gathered", mutates_args=())
def gathered(x: torch.Tensor) -> torch.Tensor:
    """Stands for a collective that brings rows together, here of one rank."""
    return x.clone()


@gathered.register_fake
def _(x):
    return torch.empty_like(x)


def product_of(x, w, spec=MX):
    a, b = (ops.quantize(ops.hadamard(t, 32, None, False, torch.float32), spec, None, 0)[:2] for t in (x, w))
    codes = b[0].t() if spec == TENSOR else b[0]
    return ops.dequantize(*a, spec, torch.float32), ops.scaled_mm(*a, codes, b[1], spec, spec, torch.float32)


def traced(function, *shapes):
    with FakeTensorMode():
        return make_fx(lambda *given: function(*given))(*map(torch.empty, shapes))


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_a_view_has_the_arguments_of_its_operator(view):
    assert [field.name for field in fields(view)] == [name for name, _ in parameters(view.op)]


def test_what_is_read_is_written_again():
    graph = traced(product_of, (8, 64), (16, 64)).graph
    for node in graph.nodes:
        view = next((view for view in (Hadamard, Quantize, Dequantize) if node.target is view.op), None)
        read = Product.of(node) if node.target in SCALED else view.of(node) if view is not None else None
        if read is not None:
            again = read.emit(Builder(graph, like=node, before=node, backward=False))
            assert (again.args, again.kwargs) == (node.args, node.kwargs)
            assert type(read).of(again) == read


def test_a_product_knows_its_operands():
    graph = traced(partial(product_of, spec=TENSOR), (64, 64), (64, 64)).graph
    (node,) = graph.find_nodes(op="call_function", target=ir.SCALED_MM)
    product = Product.of(node)
    assert [(str(side.spec), side.rotation, side.layout) for side in product.operands] == [
        (TENSOR, 32, ROWS), (TENSOR, 32, TRANSPOSED)]
    assert product.dtype is torch.float32 and product.kind.single and product.gain == 1.0
    assert Quantizer.of(product.b.codes).node is Quantizer.of(product.b.scales).node


def test_another_node_is_refused_by_name():
    graph = traced(product_of, (8, 64), (16, 64)).graph
    node = graph.find_nodes(op="call_function", target=ir.QUANTIZE)[0]
    with pytest.raises(TypeError, match=f"{node.name}.* is no product of quantised operands"):
        Product.of(node)
    with pytest.raises(TypeError, match=f"{node.name}.* is no quartet.dequantize"):
        Dequantize.of(node)
    with pytest.raises(ValueError, match="not known to come from a quantiser"):
        Quantizer.of(node)


def between(state, op, change=lambda product: None):
    """A pass that puts ``op`` between quantisers and products, where operands lie as they were quantised."""
    products = [node for node in state.gm.graph.nodes if node.target in SCALED]
    for node in products:
        build = Builder(state.gm.graph, like=node, before=node, backward=is_backward(node))
        for side in Product.of(node).operands:
            if side.layout == ROWS:
                for read in (side.codes, side.scales):
                    node.replace_input_with(read, build(op, read))
        change(node)
    state.gm.recompile()
    assert products


@pytest.fixture
def insert(monkeypatch):
    """Let a pass follow ``quantize``."""
    def put(op, **change):
        @graph_pass(optional=True)
        def inserted(state):
            between(state, op, **change)

        steps = list(pipeline.PASSES)
        steps.insert(1 + [step.name for step in steps].index("quantize"), inserted)
        monkeypatch.setattr(pipeline, "PASSES", tuple(steps))

    return put


@pytest.mark.parametrize("op", [aten.clone.default, torch.ops.operands_test.gathered.default], ids=["copy", "foreign"])
@pytest.mark.parametrize("policy, target", [
    ("quartet", "cpu"), ("mxfp8", "cpu"), ("int8", "cpu"), ("quartet", "sm_90"), ("fp8-rowwise", "sm_90"),
    ("quartet", "sm_100a"), ("mxfp8", "sm_100a"), ("nvfp4", "sm_100a"), ("nvfp4", "sm_90"),
])
def test_what_keeps_rows_changes_no_kernel(insert, policy, target, op):
    if policy in ("nvfp4", "int8") and op is not aten.clone.default:
        pytest.skip("its scales hang on the whole tensor")
    plain, moved = [], []
    trace(target, *linear(), records=plain, policy=policy)
    insert(op)
    trace(target, *linear(), records=moved, policy=policy)
    assert [record.kernel for record in moved] == [record.kernel for record in plain] and plain[0].kernel


@pytest.mark.parametrize("policy, target", [("quartet", "cpu"), ("mxfp8", "cpu"), ("mxfp8", "sm_100a")])
def test_what_keeps_rows_changes_no_number(insert, policy, target):
    model, x = linear()
    gradient = torch.randn(40, 96, dtype=torch.bfloat16)
    want, _ = carry_out(target, model, x, policy, gradient)
    insert(torch.ops.operands_test.gathered.default)
    got, graphs = carry_out(target, model, x, policy, gradient)
    assert sum(targets(gm)[torch.ops.operands_test.gathered.default] for gm in graphs) >= 8
    assert all(map(torch.equal, got, want))


def test_swizzled_scales_do_not_move(insert):
    insert(torch.ops.operands_test.gathered.default)
    graphs = trace("sm_100a", *linear(), recompute="none")
    for gm in graphs:
        moved = gm.graph.find_nodes(op="call_function", target=torch.ops.operands_test.gathered.default)
        assert moved and all(node.meta["val"].dim() == 2 for node in moved)
        assert targets(gm)[block_scaled_ops.SWIZZLE] == targets(gm)[blackwell_ops.UNSWIZZLE] > 0
        assert targets(gm)[block_scaled_ops.MM] and not targets(gm)[ir.SCALED_MM]


def test_the_rows_of_a_tensor_with_one_scale_do_not_move(insert):
    insert(torch.ops.operands_test.gathered.default)
    with pytest.raises(BackendCompilerFailed, match="(?s)BrokenGraph.*only rows of a row-local quantiser are moved"):
        trace("cpu", *linear(), policy="fp8")


def test_a_product_that_says_another_rotation_is_refused(insert):
    def lie(node):
        node.meta[OPERANDS_KEY] = tuple((16, layout) for _, layout in node.meta[OPERANDS_KEY])

    insert(aten.clone.default, change=lie)
    with pytest.raises(BackendCompilerFailed, match="(?s)BrokenGraph.*a GEMM says how its operands are rotated"):
        trace("cpu", *linear(), policy="quartet")


def test_what_is_behind_another_node_is_not_known():
    def function(x, w):
        a, b = (ops.quantize(t, MX, None, 0)[:2] for t in (x, w))
        return ops.scaled_mm(torch.ops.operands_test.gathered(a[0]), a[1], b[0].clone(), b[1], MX, MX, torch.float32)

    graph = traced(function, (8, 64), (16, 64)).graph
    (node,) = graph.find_nodes(op="call_function", target=ir.SCALED_MM)
    product = Product.of(node)
    assert quantizer_of(product.a.codes) is None and product.a.rotation is None and product.a.layout is None
    assert (product.b.rotation, product.b.layout) == (0, ROWS)
