"""``lower``: each product and the chain around it, as the first kernel that takes it writes them."""

from dataclasses import fields

import pytest
import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline

from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.passes.compilation import Compilation


def lowered(target, recipe, **options):
    with torch.no_grad():
        return around("lower", linear(), matrix(8, 32), policy=recipe, target=target, **options)


def test_rotated_blocks_on_fp8_tensor_cores():
    assert_expected_inline(lowered("sm_90", "quartet").text, """\
  %0 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
  %1 = permute(%2, [1, 0]) : bf16[64, 32]
- %3 = hadamard(x, 32, %0, False, f32) : f32[8, 32]
- %4 = hadamard(%1, 32, %0, False, f32) : f32[64, 32]
- %5 = quantize(%3, 'e2m1/32 e8m0 even nearest', None, 0) : (u8[8, 16], u8[8, 1], u8[0])
- %6 = %5[0] : u8[8, 16]
- %7 = %5[1] : u8[8, 1]
- %8 = quantize(%4, 'e2m1/32 e8m0 even nearest', None, 0) : (u8[64, 16], u8[64, 1], u8[0])
- %9 = %8[0] : u8[64, 16]
- %10 = %8[1] : u8[64, 1]
- %11 = scaled_mm(%6, %7, %9, %10, 'e2m1/32 e8m0 even nearest', 'e2m1/32 e8m0 even nearest', bf16) : bf16[8, 64]
- return [%11]
+ %12 = cuda_quantize(x, 32, %0, 'e2m1/32 e8m0 even nearest', None, 0, None, False, True, None, None, None) : (u8[0], u8[0], u8[0], f8e4m3[8, 32], f32[8, 1])
+ %13 = %12[3] : f8e4m3[8, 32]
+ %14 = %12[4] : f32[8, 1]
+ %15 = cuda_quantize(%1, 32, %0, 'e2m1/32 e8m0 even nearest', None, 0, None, False, True, None, None, None) : (u8[0], u8[0], u8[0], f8e4m3[64, 32], f32[64, 1])
+ %16 = %15[3] : f8e4m3[64, 32]
+ %17 = %15[4] : f32[64, 1]
+ %18 = permute(%17, [1, 0]) : f32[1, 64]
+ %19 = permute(%16, [1, 0]) : f8e4m3[32, 64]
+ %20 = _scaled_mm(%13, %19, %14, %18, None, None, bf16, True) : bf16[8, 64]
+ return [%20]""")


def test_blocks_on_blackwell():
    assert_expected_inline(lowered("sm_100", "mxfp8", disable_kernels=["cutlass"]).text, """\
  %0 = permute(%1, [1, 0]) : bf16[64, 32]
- %2 = quantize(x, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 32], u8[8, 1], u8[0])
- %3 = %2[0] : f8e4m3[8, 32]
- %4 = %2[1] : u8[8, 1]
- %5 = quantize(%0, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[64, 32], u8[64, 1], u8[0])
- %6 = %5[0] : f8e4m3[64, 32]
- %7 = %5[1] : u8[64, 1]
- %8 = scaled_mm(%3, %4, %6, %7, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
- return [%8]
+ %9 = cuda_quantize_bytes(x, 'e4m3/32 e8m0 ceil nearest') : (f8e4m3[8, 32], u8[8, 1])
+ %10 = %9[0] : f8e4m3[8, 32]
+ %11 = %9[1] : u8[8, 1]
+ %12 = cuda_quantize_bytes(%0, 'e4m3/32 e8m0 ceil nearest') : (f8e4m3[64, 32], u8[64, 1])
+ %13 = %12[0] : f8e4m3[64, 32]
+ %14 = %12[1] : u8[64, 1]
+ %15 = swizzle_scales(%11, 1) : u8[512]
+ %16 = swizzle_scales(%14, 1) : u8[512]
+ %17 = library_scaled_mm(%10, %15, %13, %16, 'mxf8', 'mxf8', bf16, None) : bf16[8, 64]
+ return [%17]""")


def test_products_of_integers():
    assert_expected_inline(lowered("sm_90", "int8").text, """\
  %0 = %1[0] : i8[64, 32]
  %2 = %1[1] : f32[1, 1]
- %3 = quantize(x, 'int8/row fp32 amax nearest', None, 0) : (i8[8, 32], f32[8, 1], u8[0])
- %4 = %3[0] : i8[8, 32]
- %5 = %3[1] : f32[8, 1]
+ %6 = cuda_quantize_bytes(x, 'int8/row fp32 amax nearest') : (i8[8, 32], f32[8, 1])
+ %7 = %6[0] : i8[8, 32]
+ %8 = %6[1] : f32[8, 1]
- %9 = scaled_mm(%4, %5, %0, %2, 'int8/row fp32 amax nearest', 'int8/tensor fp32 amax nearest', bf16) : bf16[8, 64]
- return [%9]
+ %10 = int_mm(%7, %0) : f32[8, 64]
+ %11 = mul(%10, %8) : f32[8, 64]
+ %12 = permute(%2, [1, 0]) : f32[1, 1]
+ %13 = mul(%11, %12) : f32[8, 64]
+ %14 = convert_element_type(%13, bf16) : bf16[8, 64]
+ return [%14]""")


def test_nothing_to_what_inductor_inlines():
    change = lowered("cpu", "mxfp8")
    assert not change.text and {record.kernel for record in change.records} == {"inductor"}


def test_nothing_where_no_kernel_is_left():
    change = lowered("sm_90", "mxfp8", disable_kernels=registry.NAMES)
    assert not change.text and "no kernel took it (cpp: disabled" in change.decisions


def test_a_kernel_that_cannot_take_what_it_was_planned_for_is_an_error(monkeypatch):
    other = QuantSpec.parse("e4m3/row fp32 amax nearest")
    monkeypatch.setattr("quartet.passes.lower._chain", lambda operand: (other, 0))
    with pytest.raises(Exception, match=r"kernel 'triton-fp8' was planned for .*scaled_mm.* and does not take it: the "
                                        "Triton quantisers write e2m1"):
        lowered("sm_90", "quartet")


def family(*variants):
    """A device family of one's own, in one value: what it takes, what it costs, and what an option changes about it."""
    return registry.Kernel("own", "", lambda target, *question: None if target.type == "cpu" else "runs on a CPU",
                           price=lambda rates, recipe, layer, role: 1e-6, variants=variants)


def test_what_options_change_about_a_family_is_its_own():
    seen = []
    registry.register(family(("accumulation", "promoted", lambda graph: seen.append("promoted")),
                             ("portable_rounding", True, lambda graph: seen.append("portable"))), before="cpp")
    try:
        assert {r.kernel for r in lowered("cpu", "mxfp8").records} == {"own"} and not seen
        lowered("cpu", "mxfp8", accumulation="promoted")
        assert seen == ["promoted"]
        assert {r.kernel for r in lowered("sm_90", "quartet", portable_rounding=True).records} == {"triton-fp8"}
        assert seen == ["promoted"]
    finally:
        registry.unregister("own")


def test_variants_name_what_a_compilation_is_told():
    told = {f.name for f in fields(Compilation)}
    assert {option for kernel in registry.KERNELS for option, _, _ in kernel.variants} <= told
