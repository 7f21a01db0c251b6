"""INT8 operands multiplied as integers: what is accepted, what _int_mm is given, and the numbers."""

import pytest
import torch
from traced import carry_out, linear, targets, trace

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir, registry
from quartet.lowering.ir.ops import fp8 as fp8_ops
from quartet.lowering.targets.int8 import lower as int8
from quartet.lowering.targets.int8 import ops as int8_ops
from quartet.runtime.devices import Target

aten = torch.ops.aten
ROW, TENSOR, TERNARY, BLOCK = map(QuantSpec.parse, (
    "int8/row fp32 amax nearest", "int8/tensor fp32 amax nearest", "ternary/tensor fp32 absmean nearest",
    "int8/32 fp32 amax nearest"))
RECIPES = {"int8": 2, "int8-all": 3, "halo-int8-2": 3, "bitnet": 1}


def choose(a, b, target, dtype=torch.bfloat16):
    kernel, reasons = registry.choose(Target.named(target), dtype, ((a, 0), (b, 0)))
    return kernel.name, reasons.get("int-mm")


@pytest.mark.parametrize("target", ["cpu", "sm_80", "sm_89", "sm_90", "sm_100a", "sm_120a"])
@pytest.mark.parametrize("pair", [(ROW, TENSOR), (TENSOR, TENSOR), (ROW, ROW), (ROW, TERNARY)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_tensors_are_multiplied_as_integers(target, pair, dtype):
    assert choose(*pair, target, dtype) == ("int-mm", None)


@pytest.mark.parametrize("a, b, reason", [
    (BLOCK, BLOCK, "with one scale a row or a tensor, not a scale every 32 elements"),
    (ROW, QuantSpec.parse("e4m3/row fp32 amax nearest"), "multiplies INT8 operands, not e4m3")])
def test_what_is_declined(a, b, reason):
    name, why = choose(a, b, "sm_90")
    assert name == "inductor" and reason in why


def test_devices_without_it(monkeypatch):
    def why(*target):
        return int8.supports(Target(*target), torch.bfloat16, ROW, 0)

    assert "need compute capability 7.5 or more, this device has 7.0" in why("cuda", "sm_70")
    assert "ROCm" in why("cuda", "gfx942")
    assert "not on xpu" in why("xpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    assert "without VNNI" in why("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert why("cpu") is None


# the graph

@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("k, n, tokens", [(64, 96, 40), (50, 33, 17), (16, 40, 130)])
def test_sizes_and_layouts_are_those_that_a_gpu_takes(recipe, k, n, tokens):
    graphs = trace("sm_90", *linear(k=k, n=n, tokens=tokens), policy=recipe)
    found = [node for gm in graphs for node in gm.graph.find_nodes(op="call_function", target=aten._int_mm.default)]
    assert len(found) == RECIPES[recipe] and not any(targets(gm)[ir.SCALED_MM] for gm in graphs)
    for node in found:
        a, b = (arg.meta["val"] for arg in node.args)
        assert a.dtype is b.dtype is torch.int8 and a.shape[0] > 16
        assert a.shape[1] % 16 == 0 and b.shape[0] == a.shape[1] and b.shape[1] % 16 == 0
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
    assert graphs[0].graph.output_node().args[0][0].meta["val"].shape == (tokens, n)


def test_a_transposed_operand_is_copied_once():
    _, backward = trace("sm_90", *linear(), policy="int8")
    assert targets(backward)[fp8_ops.ROW_MAJOR] == 1  # Wᵀ


@pytest.mark.parametrize("tokens, dynamic", [(8, False), (40, True)])
def test_few_rows_or_unknown_sizes_are_left_to_run_time(tokens, dynamic):
    forward, *_ = trace("sm_90", *linear(tokens=tokens), policy="int8", dynamic=dynamic)
    assert targets(forward)[int8_ops.INT_MM] == 1 and not targets(forward)[aten._int_mm.default]


def test_a_contraction_that_overflows_int32_is_left_to_run_time():
    tokens = int8_ops.LONGEST + 16
    _, backward = trace("sm_90", *linear(k=32, n=32, tokens=tokens), policy="int8-all")
    assert targets(backward)[int8_ops.INT_MM] == 1 and targets(backward)[aten._int_mm.default] == 1


# the numbers

@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, n, tokens", [(64, 96, 40), (50, 33, 7)])
def test_lowered_graphs_are_bit_equal_while_the_reference_is_exact(recipe, dtype, k, n, tokens):
    torch.manual_seed(0)
    model, x = linear(dtype, k, n, tokens)
    gradient = (torch.randn(tokens, n) * torch.randn(tokens, 1).exp()).to(dtype)
    got, graphs = carry_out("sm_90", model, x, recipe, gradient)
    wanted, _ = carry_out("sm_90", model, x, recipe, gradient, disable_kernels=["int-mm"])
    assert sum(targets(gm)[aten._int_mm.default] + targets(gm)[int8_ops.INT_MM] for gm in graphs) == RECIPES[recipe]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_sums_that_fp32_does_not_hold_are_rounded_once():
    a, b = (torch.randint(100, 128, (20, 4096), dtype=torch.int8) for _ in range(2))
    exact = a.long() @ b.long().t()
    assert int(exact.max()) > 2**24
    assert torch.equal(torch._int_mm(a, b.t()).float(), exact.float())
    assert torch.equal(int8_ops.INT_MM(a, b), exact.float())


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_parts_of_a_long_contraction_do_not_overflow(rows):
    k = 2 * int8_ops.LONGEST + 32
    a, b = torch.full((rows, k), 127, dtype=torch.int8), torch.full((16, k), -127, dtype=torch.int8)
    got = int8_ops.INT_MM(a, b)
    assert got.shape == (rows, 16) and got.dtype is torch.float32
    torch.testing.assert_close(got, torch.full((rows, 16), -127.0**2 * k), rtol=2**-23, atol=0)


def test_nan_stays_visible():
    model, x = linear(torch.float32)
    x = x.detach()
    x[3, 4] = float("nan")
    (out, *_), _ = carry_out("sm_90", model, x, "int8", torch.ones(40, 96))
    assert out[3].isnan().all() and out[4].isfinite().all()
