"""NVFP4 and MXFP8 on Blackwell: every product on the block-scaled tensor cores, its operands those of the reference."""

import operator
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scaled_mm import fakes_have_scales_checked
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import carry_out, linear, targets, trace

import quartet
from quartet.kernels import reference
from quartet.kernels.cutlass.configuration import supports
from quartet.kernels.reference.formats.nvfp4 import tensor_scales
from quartet.kernels.reference.formats.packing import swizzled_size
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir, registry
from quartet.lowering.ir.ops import fused
from quartet.lowering.targets import inductor
from quartet.lowering.targets.blackwell import block_scaled
from quartet.lowering.targets.blackwell import block_scaled_ops as ops
from quartet.lowering.targets.blackwell import ops as blackwell_ops
from quartet.runtime.devices import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "scenarios"))
from models import Block  # noqa: E402

aten = torch.ops.aten
ARCHS = ("sm_100a", "sm_103a", "sm_120a", "sm_121a")
RECIPES = ("nvfp4", "quartet2", "mxfp8")
KINDS = {"nvfp4": "nvf4", "quartet2": "nvf4", "mxfp8": "mxf8"}
PRODUCTS = {"cutlass": ops.MM, "scaled-mm": ops.LIBRARY_MM}
FORMATS = {text: QuantSpec.parse(text) for text in (
    "e2m1/16 e4m3 amax nearest", "e2m1/16x16 e4m3 amax nearest", "e2m1/16 e4m3 four_six nearest",
    "e4m3/32 e8m0 ceil nearest", "e4m3/32 e8m0 floor nearest")}


def products(gm, op):
    return gm.graph.find_nodes(op="call_function", target=op)


def through(node, *views):
    """What is behind padding and the given ops, and which result of it."""
    while node.target in (aten.constant_pad_nd.default, *views):
        node = node.args[0]
    return (node.args[0], node.args[1]) if node.target is operator.getitem else (node, None)


# what is accepted

@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_order_of_kernels(arch, text):
    specs = ((FORMATS[text], 0), (FORMATS[text], 0))
    taken = []
    for _ in range(3):
        kernel, reasons = registry.choose(Target.named(arch), torch.bfloat16, specs, tuple(taken))
        taken.append(kernel.name)
    mxfp8 = FORMATS[text].element == "e4m3"
    assert taken == ["cutlass", "scaled-mm", "inductor" if mxfp8 else "triton"]
    assert ("Triton quantisers" if mxfp8 else "scale blocks of 32") in reasons["dot-scaled"]


@pytest.mark.parametrize("a, b, reason", [
    ("e2m1/16 e4m3 amax nearest", "e4m3/32 e8m0 ceil nearest", "of one format, not NVFP4 and MXFP8"),
    ("e2m1/32 e8m0 ceil nearest", "e4m3/32 e8m0 ceil nearest", "of one format, not MXFP4 and MXFP8")])
def test_two_formats_in_one_product_are_declined(a, b, reason):
    kernel, reasons = registry.choose(Target.named("sm_100a"), torch.bfloat16,
                                      ((QuantSpec.parse(a), 0), (QuantSpec.parse(b), 0)))
    assert kernel.name == "inductor" and reason in reasons["cutlass"]


@pytest.mark.parametrize("target, dtype, reason", [
    ("sm_90", torch.bfloat16, "not 9.0; what is dequantised instead is exact in bfloat16"),
    ("sm_89", torch.float32, "not 8.9"), ("cpu", torch.bfloat16, "are on NVIDIA GPUs, not on cpu"),
    ("sm_100a", torch.float64, "the product is bfloat16, float16, float32, not float64")])
def test_what_declines_says_why(target, dtype, reason):
    for spec in FORMATS.values():
        kernel, reasons = registry.choose(Target.named(target), dtype, ((spec, 0), (spec, 0)))
        assert kernel.name in ("triton", "inductor") and reasons["cutlass"].endswith(reason)
        assert reasons["scaled-mm"].endswith(reason)


def test_without_the_compiler_pytorchs_own_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("quartet.kernels.cutlass.toolchain.unavailable", lambda arch: f"nvcc is missing for {arch}")
    for spec in FORMATS.values():
        kernel, reasons = registry.choose(Target("cuda", "sm_120"), torch.bfloat16, ((spec, 0), (spec, 0)))
        assert kernel.name == "scaled-mm" and reasons["cutlass"] == "nvcc is missing for sm_120a"


# the graph

@pytest.mark.parametrize("arch, disable", [("sm_100a", ()), ("sm_120a", ()), ("sm_100a", ("cutlass",))])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_product_of_a_llama_block(arch, recipe, disable):
    model, records = Block(128, 4, 256).bfloat16(), []
    x = torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    graphs = trace(arch, model, x, policy=recipe, records=records, disable_kernels=list(disable))
    name = "scaled-mm" if disable else "cutlass"
    assert [r.kernel for r in records if r.lowered] == [name] * 21
    assert [targets(gm)[PRODUCTS[name]] for gm in graphs] == [7, 14]
    for gm in graphs:
        assert not targets(gm)[ir.SCALED_MM] and not targets(gm)[aten.mm.default]
        for node in products(gm, PRODUCTS[name]):
            agree(node, KINDS[recipe])


def agree(node, kind):
    """Codes, scales and factor of an operand come from one quantiser, in the layout and size that the product reads."""
    a, a_scales, b, b_scales, *rest = node.args
    assert rest[0] == kind
    (m, width), n = a.meta["val"].shape, b.meta["val"].shape[0]
    k = width * (2 if kind == "nvf4" else 1)
    assert b.meta["val"].shape[1] == width and supports(kind, m, n, k) is None
    for codes, scales, rows in ((a, a_scales, m), (b, b_scales, n)):
        assert codes.meta["val"].is_contiguous()
        (made, first), (same, second) = through(codes), through(scales, ops.SWIZZLE)
        assert made is same
        if kind == "nvf4":  # one launch for both, or for two tensors along both axes
            assert made.target in (blackwell_ops.QUANTIZE, blackwell_ops.QUANTIZE_BOTH)
            assert second == first + 1 and scales.target is operator.getitem
        else:
            assert made.target in (fused.QUANTIZE_BYTES, fused.QUANTIZE_BYTES_BOTH) and second == first + 1
            assert scales.target is ops.SWIZZLE and scales.args[1] == 1
        assert scales.meta["val"].numel() == swizzled_size(rows, k // (16 if kind == "nvf4" else 32))
        assert scales.meta["val"].dtype is torch.uint8
    if kind == "nvf4":
        assert node.args[-1].meta["val"].dtype is torch.float32 and node.args[-1].meta["val"].numel() == 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("k, n, tokens", [(80, 33, 7), (48, 60, 77), (32, 8, 1), (4096, 12, 130)])
def test_sizes_are_padded_to_what_the_kernels_take(recipe, k, n, tokens):
    forward, backward = trace("sm_120a", *linear(k=k, n=n, tokens=tokens), policy=recipe)
    for gm in (forward, backward):
        for node in products(gm, ops.MM):
            agree(node, KINDS[recipe])
    assert forward.graph.output_node().args[0][0].meta["val"].shape == (tokens, n)


@pytest.mark.parametrize("recipe", RECIPES)
def test_dynamic_tokens(recipe):
    forward, *_, backward = trace("sm_100a", *linear(n=30), policy=recipe, dynamic=True)
    assert targets(forward)[ops.MM] == 1 and targets(backward)[ops.MM] == 2


def test_scales_and_factor_of_a_tensor_that_three_layers_read_are_made_once():
    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    forward, _ = trace("sm_100a", Three().bfloat16(), x, policy="nvfp4")
    assert targets(forward)[blackwell_ops.QUANTIZE] == 4 and targets(forward)[ops.MM] == 3
    assert targets(forward)[aten.mul.Tensor] == 4 + 4 + 3  # of multipliers, of factors, of their products
    forward, _ = trace("sm_100a", Three().bfloat16(), x, policy="mxfp8")
    assert targets(forward)[ops.SWIZZLE] == 4 and targets(forward)[ops.MM] == 3


def test_formats_of_one_model_share_a_graph():
    policy = quartet.Policy("quartet").on("1", "nvfp4").on("2", "mxfp8")
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(3))).bfloat16()
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    graphs = trace("sm_100a", model, x, policy=policy, recompute="none")
    assert [sorted(node.args[4] for node in products(gm, ops.MM)) for gm in graphs] == [
        ["mxf4", "mxf8", "nvf4"], ["mxf4"] * 2 + ["mxf8"] * 2 + ["nvf4"] * 2]


# the numbers

@pytest.mark.parametrize("disable", [["cutlass"], []], ids=["scaled-mm", "cutlass"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("k, n, tokens", [(64, 96, 40), (80, 33, 7)])
def test_lowered_graphs_compute_what_the_reference_does(recipe, disable, k, n, tokens):
    """Forward and backward of one layer, whose quantisers all read the same numbers on both sides."""
    torch.manual_seed(0)
    model, x = linear(torch.float32, k, n, tokens)
    gradient = torch.randn(tokens, n) * torch.randn(tokens, 1).exp()
    got, graphs = carry_out("sm_100a", model, x, recipe, gradient, disable_kernels=disable)
    wanted, plain = carry_out("sm_100a", model, x, recipe, gradient, disable_kernels=["cutlass", "scaled-mm", "triton"])
    assert sum(targets(gm)[ops.MM] + targets(gm)[ops.LIBRARY_MM] for gm in graphs) == 3
    assert sum(targets(gm)[ir.SCALED_MM] for gm in plain) == 3
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp8"])
def test_a_block_trains_alike(recipe):
    torch.manual_seed(0)
    model, x = Block(64, 2, 96), torch.randn(2, 20, 64)
    gradient = torch.randn(2, 20, 64)
    got, _ = carry_out("sm_120a", model, x, recipe, gradient)
    wanted, _ = carry_out("sm_120a", model, x, recipe, gradient, disable_kernels=["cutlass", "scaled-mm", "triton"])
    for a, b in zip(got, wanted, strict=True):  # a rounding may fall to the other side, and all that follows from it
        assert float(F.cosine_similarity(a.flatten(), b.flatten(), 0)) > 0.99


def quantized(rows, cols, spec, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    amax = reference.largest_magnitude(x) if spec.takes_amax else None
    return *reference.quantize(x, spec, amax=amax)[:2], amax


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("rows, cols", [(1, 32), (130, 96), (17, 160)])
def test_operands_read_back_from_the_kernels_layout_are_those_of_the_reference(text, rows, cols):
    spec = FORMATS[text]
    codes, scales, amax = quantized(rows, cols, spec, rows)
    flat = ops.swizzle_scales.reference(scales, 16 if spec.tile else 1)
    assert flat.shape == ops._swizzle_fake(scales, 16 if spec.tile else 1).shape
    factor = tensor_scales(amax, spec)[1] if amax is not None else 1.0
    values = ops.values(codes, flat, block_scaled.kind_of(spec)) * factor
    assert torch.equal(values, reference.dequantize(codes, scales, spec, amax=amax))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_stays_visible(recipe, bad):
    model, x = linear(torch.float32)
    x = x.detach()
    x[3, 4] = bad
    (out, *_), _ = carry_out("sm_100a", model, x, recipe, torch.ones(40, 96))
    assert out[3].isnan().all()
    assert out[4].isfinite().all() or recipe != "mxfp8"  # NVFP4: one number scales the whole tensor


@pytest.mark.parametrize("kind", ["nvf4", "mxf8"])
def test_pytorch_accepts_the_arguments(kind):
    """Its own checks of types, sizes and layouts, on fake CUDA tensors."""
    m, n, k = 130, 48, 96
    width, block = (k // 2, 16) if kind == "nvf4" else (k, 32)
    with FakeTensorMode():
        dtype = torch.uint8 if kind == "nvf4" else torch.float8_e4m3fn
        a, b = (torch.empty(rows, width, dtype=dtype, device="cuda") for rows in (m, n))
        scales = [torch.empty(swizzled_size(rows, k // block), dtype=torch.uint8, device="cuda") for rows in (m, n)]
        factors = tuple(torch.empty(1, 1, device="cuda") for _ in range(2)) if kind == "nvf4" else None
        call = ops.library_call(a, scales[0], b, scales[1], kind, kind, torch.bfloat16, factors)
        out = F.scaled_mm(**call)
        assert out.shape == (m, n) and out.dtype is torch.bfloat16
        if not fakes_have_scales_checked():
            pytest.skip("this PyTorch checks the scales of real tensors only")
        with pytest.raises((RuntimeError, ValueError)):
            F.scaled_mm(**{**call, "scale_a": [scales[1][:-1].view(call["scale_a"][0].dtype), *call["scale_a"][1:]]})


def test_inductor_inlines_the_swizzle_and_hands_over_rows(tmp_path):
    def product(a, scales, b, tiles):
        swizzled = torch.ops.quartet.swizzle_scales(scales, 1), torch.ops.quartet.swizzle_scales(tiles, 16)
        return torch.ops.quartet.block_scaled_mm(a.t() ^ 1, swizzled[0], b + 0, swizzled[1], "nvf4", 1.0, torch.float32)

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=g) for shape in ((48, 17), (40, 48)))
    scales, tiles = (torch.rand(rows, 6, generator=g).to(torch.float8_e4m3fn) for rows in (17, 3))
    inductor.register()
    with fresh_cache(dir=str(tmp_path)):
        got, code = run_and_get_code(torch.compile(product, fullgraph=True), a, scales, b, tiles)
    assert "quartet.block_scaled_mm" in "".join(code) and "quartet.swizzle_scales" not in "".join(
        line for line in "\n".join(code).splitlines() if "#" not in line)
    assert torch.equal(got, product(a, scales, b, tiles))


def test_mixed_recipe_of_formats_keeps_what_each_reads():
    """dgrad in FP8 reads what the NVFP4 product of forward does not."""
    recipes = quartet.recipes()
    mixed = replace(recipes["nvfp4"], name="mixed", dgrad=recipes["fp8"].dgrad, keep=())
    records = []
    trace("sm_100a", *linear(), policy=quartet.Policy(mixed), records=records)
    assert {r.role: r.kernel for r in records} == {"fprop": "cutlass", "dgrad": "cublaslt", "wgrad": "cutlass"}
