"""FP8 with fp32 scales of blocks and tiles on Hopper, through PyTorch's block-scaled product."""

import pytest
import torch
import torch.nn.functional as F
from scaled_mm import fakes_have_scales_checked
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import carry_out, linear, targets, trace

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir, registry
from quartet.lowering.targets.blackwell import block_scaled_ops as ops
from quartet.lowering.targets.blackwell import library as scaled_mm
from quartet.runtime.devices import Target

ROWS, TILES, OTHER, E5M2 = map(QuantSpec.parse, (
    "e4m3/128 fp32 amax_pow2 nearest", "e4m3/128x128 fp32 amax_pow2 nearest", "e4m3/64 fp32 amax nearest",
    "e5m2/128 fp32 amax nearest"))
FORMATS = {ROWS: "1x128", TILES: "128x128"}


def choose(a, b, target=None, dtype=torch.bfloat16):
    kernel, reasons = registry.choose(target or Target.named("sm_90"), dtype, ((a, 0), (b, 0)))
    return kernel.name, reasons.get("scaled-mm")


@pytest.mark.parametrize("pair", [(ROWS, ROWS), (ROWS, TILES), (TILES, ROWS), (E5M2, ROWS)], ids=str)
def test_pairs_that_hopper_multiplies(pair):
    for dtype in (torch.bfloat16, torch.float32):
        assert choose(*pair, dtype=dtype) == ("scaled-mm", None)


@pytest.mark.parametrize("a, b, target, dtype, reason", [
    (TILES, TILES, "sm_90", torch.bfloat16, "no product of 128x128 and 128x128"),
    (E5M2, E5M2, "sm_90", torch.bfloat16, "no product of e5m2 and e5m2"),
    (OTHER, OTHER, "sm_90", torch.bfloat16, "a scale every 128 elements, not e4m3/64 fp32 amax nearest"),
    (ROWS, ROWS, "sm_90", torch.float16, "bfloat16 or float32, not float16"),
    (ROWS, TILES, "sm_89", torch.bfloat16, "for compute capability 9.0 only, not 8.9"),
    (ROWS, TILES, "sm_100a", torch.bfloat16, "for compute capability 9.0 only, not 10.0"),
    (ROWS, TILES, "cpu", torch.bfloat16, "on NVIDIA GPUs, not on cpu")])
def test_what_is_declined(a, b, target, dtype, reason):
    name, why = choose(a, b, Target.named(target), dtype)
    assert name == "inductor" and reason in why


@pytest.mark.parametrize("version, taken", [("12.8", False), ("12.9", True), ("13.0", True), (None, False)])
def test_the_cuda_that_pytorch_is_built_for(monkeypatch, version, taken):
    monkeypatch.setattr(torch.version, "cuda", version)
    name, why = choose(ROWS, TILES, Target("cuda", "sm_90"))
    assert (name == "scaled-mm") is taken and (taken or "CUDA 12.9" in why)


@pytest.mark.parametrize("k, n, tokens", [(256, 384, 128), (300, 130, 7), (128, 16, 129)])
def test_layouts(k, n, tokens):
    graphs = trace("sm_90", *linear(k=k, n=n, tokens=tokens), policy="fp8-block")
    found = [node for gm in graphs for node in gm.graph.find_nodes(op="call_function", target=ops.LIBRARY_MM)]
    assert len(found) == 3 and not any(targets(gm)[ir.SCALED_MM] for gm in graphs)
    for node in found:
        a, a_scales, b, b_scales = (arg.meta["val"] for arg in node.args[:4])
        assert a.shape[1] == b.shape[1] and a.shape[1] % 128 == 0 and b.shape[0] % 16 == 0
        for codes, scales, format in ((a, a_scales, node.args[4]), (b, b_scales, node.args[5])):
            rows, blocks = codes.shape[0], codes.shape[1] // 128
            assert codes.is_contiguous() and scales.is_contiguous() and scales.dtype is torch.float32
            assert scales.shape == ((blocks, rows) if format == "1x128" else (-(-rows // 128), -(-blocks // 4) * 4))
    pairs = sorted(node.args[4:6] for node in found)
    assert pairs == [("1x128", "128x128"), ("1x128", "128x128"), ("1x128", "1x128")]  # W in tiles
    assert graphs[0].graph.output_node().args[0][0].meta["val"].shape == (tokens, n)


def test_dynamic_tokens():
    forward, *_, backward = trace("sm_90", *linear(), policy="fp8-block", dynamic=True)
    assert targets(forward)[ops.LIBRARY_MM] == 1 and targets(backward)[ops.LIBRARY_MM] == 2


@pytest.mark.parametrize("k, n, tokens", [(256, 130, 40), (300, 33, 129)])
def test_lowered_graphs_compute_what_the_reference_does(k, n, tokens):
    torch.manual_seed(0)
    model, x = linear(torch.float32, k, n, tokens)
    gradient = torch.randn(tokens, n) * torch.randn(tokens, 1).exp()
    got, graphs = carry_out("sm_90", model, x, "fp8-block", gradient)
    wanted, _ = carry_out("sm_90", model, x, "fp8-block", gradient, disable_kernels=["scaled-mm"])
    assert sum(targets(gm)[ops.LIBRARY_MM] for gm in graphs) == 3
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("pair", [(ROWS, ROWS), (ROWS, TILES), (TILES, ROWS)], ids=str)
def test_pytorch_accepts_the_arguments(pair):
    """Its own checks of types, sizes and strides, on fake CUDA tensors."""
    m, n, k = 384, 256, 640
    with FakeTensorMode():
        operands = []
        for rows, spec in ((m, pair[0]), (n, pair[1])):
            codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="cuda")
            shape = (-(-rows // 128), 8) if spec.tile else (k // 128, rows)
            operands += [codes, torch.empty(shape, device="cuda")]
        formats = [FORMATS[spec] for spec in pair]
        call = ops.library_call(*operands, *formats, torch.bfloat16, None)
        assert F.scaled_mm(**call).shape == (m, n)
        if not fakes_have_scales_checked():
            pytest.skip("this PyTorch checks the scales of real tensors only")
        with pytest.raises((RuntimeError, ValueError)):
            F.scaled_mm(**{**call, "scale_a": [call["scale_a"][0].t()]})


@pytest.mark.parametrize("spec", [ROWS, TILES], ids=str)
@pytest.mark.parametrize("rows, cols", [(1, 128), (130, 640), (256, 300)])
def test_operands_read_back_are_those_of_the_reference(spec, rows, cols):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    codes, scales, _ = reference.quantize(x, spec)
    turned = F.pad(scales, (0, -scales.shape[1] % 4)) if spec.tile else scales.t().contiguous()
    assert torch.equal(ops.values(codes, turned, FORMATS[spec]), reference.dequantize(codes, scales, spec))


def test_the_family_says_what_it_multiplies():
    rows = {(format, kernel): why for format, kernel, why in registry.probe(Target.named("sm_90"))}
    assert rows["fp8 a block", "scaled-mm"] is rows["fp8 a tile", "scaled-mm"] is None
    assert "exact in bfloat16" in rows["nvfp4", "scaled-mm"] and rows["int8 a row", "int-mm"] is None
    assert scaled_mm.supports(Target.named("sm_120a"), torch.bfloat16, QuantSpec("e4m3"), 0) is None
