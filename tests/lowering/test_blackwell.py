"""A training graph lowered for Blackwell GPUs that are not here: all products on FP4 tensor cores, nothing unpacked."""

import operator
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from traced import assert_no_semantics, linear, targets, trace

import quartet
from quartet.kernels.reference.formats.packing import swizzle_scales, swizzled_size
from quartet.lowering import ir, registry
from quartet.lowering.ir.ops import fused as cuda_ops
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.lowering.targets.blackwell import ops as blackwell_ops
from quartet.runtime.devices import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "scenarios"))
from models import Block  # noqa: E402

pytest.importorskip("triton")

aten = torch.ops.aten
ARCHS = ("sm_100a", "sm_103a", "sm_120a", "sm_121a")
PACKED = (*blackwell_ops.QUANTIZERS, cuda_ops.UNROTATE, block_scaled_ops.MM)


def origin(node):
    """(op that made a result, which of its results), through getitem and the padding of rows."""
    while node.target is aten.constant_pad_nd.default:
        node = node.args[0]
    return (node.args[0], node.args[1]) if node.target is operator.getitem else (node, None)


def block():
    return Block(128, 4, 256).bfloat16(), torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("target", ARCHS)
def test_every_product_of_a_llama_block_is_an_fp4_gemm(target):
    records = []
    forward, backward = trace(target, *block(), records=records, recompute="none")
    assert [r.kernel for r in records if r.lowered] == ["cutlass"] * 21
    assert all("scaled_dot_product_attention" in r.reason for r in records if not r.lowered)
    assert targets(forward)[block_scaled_ops.MM] == 7 and targets(backward)[block_scaled_ops.MM] == 14
    assert_no_semantics(forward, backward)
    for gm in (forward, backward):
        used = targets(gm)
        assert not used[cuda_ops.FOLD] and not used[cuda_ops.DEQUANTIZE] and not used[blackwell_ops.UNSWIZZLE]
        assert not used[aten._scaled_mm.default] and not used[aten.mm.default]


@pytest.mark.parametrize("recompute", ["none", "gemm"])
def test_layouts_agree_along_every_edge(recompute):
    """Codes and scales of an operand are results of one quantiser, or come from forward together."""
    forward, backward = trace("sm_100a", *block(), recompute=recompute)
    kept = [node if isinstance(node, torch.fx.Node) else None for node in forward.graph.output_node().args[0]]
    made = {}  # name of an input of backward → (quantiser of forward, which result)
    for node in filter(None, kept):
        if node.op == "call_function" and origin(node)[0].target in blackwell_ops.QUANTIZERS:
            made[node.name] = origin(node)

    def maker(gm, node):
        op, index = origin(node)
        if op.op == "placeholder":
            assert gm is backward
            op, index = made[op.name]
        return op, index

    checked = 0
    for gm in (forward, backward):
        for node in gm.graph.find_nodes(op="call_function", target=block_scaled_ops.MM):
            for codes, scales in (node.args[0:2], node.args[2:4]):
                (op, first), (same, second) = maker(gm, codes), maker(gm, scales)
                assert op is same and op.target in blackwell_ops.QUANTIZERS and (first, second) in ((0, 1), (2, 3))
                checked += 1
        for node in gm.graph.find_nodes(op="call_function", target=blackwell_ops.REQUANTIZE):
            (op, first), (same, second) = maker(gm, node.args[0]), maker(gm, node.args[1])
            assert op is same and (first, second) == (0, 1)
            checked += 1
    assert checked >= 42


def test_gains_are_the_kernels_factor_and_the_mask_and_rotation_follow_it():
    forward, backward = trace("sm_100a", *linear(), recompute="none")
    (there,), back = (gm.graph.find_nodes(op="call_function", target=block_scaled_ops.MM) for gm in (forward, backward))
    assert there.args[4:6] == ("mxf4", 1.0) and [node.args[5] for node in back] == [pytest.approx(16 / 9)] * 2
    for node in back:
        (follows,) = node.users
        assert follows.target is cuda_ops.UNROTATE and follows.args[4] == 1.0  # no second gain
    assert targets(backward)[blackwell_ops.QUANTIZE_BOTH] == 1 and targets(backward)[blackwell_ops.REQUANTIZE] == 2


@pytest.mark.parametrize("k, n, tokens", [(80, 33, 7), (100, 60, 77), (32, 8, 1), (4096, 12, 130)])
def test_shapes_of_the_products(k, n, tokens):
    forward, backward = trace("sm_120a", *linear(k=k, n=n, tokens=tokens))
    for gm in (forward, backward):
        for node in gm.graph.find_nodes(op="call_function", target=block_scaled_ops.MM):
            a, a_scales, b, b_scales = (arg.meta["val"] for arg in node.args[:4])
            assert a.shape[1] == b.shape[1] and a.shape[1] % 16 == 0 and b.shape[0] % 8 == 0
            assert a_scales.numel() == swizzled_size(a.shape[0], a.shape[1] // 16)
            assert b_scales.numel() == swizzled_size(b.shape[0], b.shape[1] // 16)
    product = forward.graph.output_node().args[0][0].meta["val"]
    assert product.shape == (tokens, n)


def test_dynamic_tokens():
    forward, *_, backward = trace("sm_100a", *linear(n=30), dynamic=True)
    assert_no_semantics(forward, backward)
    assert targets(backward)[block_scaled_ops.MM] == 2


def test_what_another_recipe_reads_of_our_codes_gets_their_scales_row_by_row():
    other = quartet.recipes()["fp8"].dgrad
    recipe = quartet.recipes()["quartet"]
    mixed = quartet.Policy(replace(recipe, name="mixed", dgrad=other))
    records = []
    forward, backward = trace("sm_100a", *linear(), policy=mixed, records=records)
    assert {r.role: r.kernel for r in records} == {"fprop": "cutlass", "dgrad": "cublaslt", "wgrad": "cutlass"}
    unswizzled = [node for gm in (forward, backward)
                  for node in gm.graph.find_nodes(op="call_function", target=blackwell_ops.UNSWIZZLE)]
    assert unswizzled
    for node in unswizzled:
        assert {user.target for user in node.users} <= {ir.DEQUANTIZE}
        assert node.meta["val"].shape == (96, 2)


def test_unswizzle_is_the_inverse():
    scales = torch.randint(0, 255, (130, 6), dtype=torch.uint8)
    assert torch.equal(blackwell_ops.fp4_unswizzle.reference(swizzle_scales(scales), 130, 6), scales)


def test_integers_on_demand():
    for gm in trace("sm_100a", *linear(), portable_rounding=True):
        used = [node for op in blackwell_ops.QUANTIZERS for node in gm.graph.find_nodes(op="call_function", target=op)]
        assert used and all(node.kwargs == {"hardware": False} for node in used)
    for gm in trace("sm_100a", *linear()):
        assert all("hardware" not in node.kwargs for node in gm.graph.nodes)


@pytest.mark.parametrize("target, reason", [
    ("sm_90", "need compute capability 10.0, 10.3, 12.0 or 12.1, not 9.0"), ("cpu", "are on NVIDIA GPUs, not on cpu")])
def test_other_devices_decline_with_the_reason(target, reason):
    rows = {(format, kernel): why for format, kernel, why in registry.probe(Target.named(target))}
    assert reason in rows["mx e2m1", "cutlass"]


def test_without_the_compiler_triton_is_taken_and_the_reason_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("quartet.kernels.cutlass.toolchain.unavailable", lambda arch: f"nvcc is missing for {arch}")
    spec = quartet.recipes()["quartet"].fprop.a.spec
    here = Target("cuda", "sm_100")
    kernel, reasons = registry.choose(here, torch.bfloat16, ((spec, 32), (spec, 32)))
    assert kernel.name == "dot-scaled" and reasons["cutlass"] == "nvcc is missing for sm_100a"
    kernel, _ = registry.choose(Target("cuda", "sm_100", pretended=True), torch.bfloat16, ((spec, 32), (spec, 32)))
    assert kernel.name == "cutlass"


@pytest.mark.parametrize("disable, op, name", [
    (["cutlass"], blackwell_ops.DOT, "dot-scaled"), (["cutlass", "dot-scaled"], aten._scaled_mm.default, "triton-fp8")])
def test_the_order_of_kernels(disable, op, name):
    records = []
    graphs = trace("sm_120a", *linear(n=30), disable_kernels=disable, records=records, recompute="none")
    assert {r.kernel for r in records} == {name} and sum(targets(gm)[op] for gm in graphs) == 3
    assert_no_semantics(*graphs)
