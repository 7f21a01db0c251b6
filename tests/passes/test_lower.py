"""``lower``: each product and the chain around it, as the first kernel that takes it writes them."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline

from quartet.lowering import registry


def lowered(target, recipe, **options):
    with torch.no_grad():
        return around("lower", linear(), matrix(8, 32), policy=recipe, target=target, **options)


def test_rotated_blocks_on_fp8_tensor_cores():
    assert_expected_inline(lowered("sm_90", "quartet").text, """\
  %1 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
  %3 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = hadamard(x, 32, %1, False, f32) : f32[8, 32]
- %4 = hadamard(%3, 32, %1, False, f32) : f32[64, 32]
- %5 = quantize(%2, 'e2m1/32 e8m0 even nearest', None, 0) : (u8[8, 16], u8[8, 1], u8[0])
- %6 = %5[0] : u8[8, 16]
- %7 = %5[1] : u8[8, 1]
- %8 = quantize(%4, 'e2m1/32 e8m0 even nearest', None, 0) : (u8[64, 16], u8[64, 1], u8[0])
- %9 = %8[0] : u8[64, 16]
- %10 = %8[1] : u8[64, 1]
- %11 = scaled_mm(%6, %7, %9, %10, 'e2m1/32 e8m0 even nearest', 'e2m1/32 e8m0 even nearest', bf16) : bf16[8, 64]
- return [%11]
+ %13 = cuda_quantize(x, 32, %1, 'e2m1/32 e8m0 even nearest', None, 0, None, False, True, None, None, None) : (u8[0], u8[0], u8[0], f8e4m3[8, 32], f32[8, 1])
+ %14 = %13[3] : f8e4m3[8, 32]
+ %15 = %13[4] : f32[8, 1]
+ %16 = cuda_quantize(%3, 32, %1, 'e2m1/32 e8m0 even nearest', None, 0, None, False, True, None, None, None) : (u8[0], u8[0], u8[0], f8e4m3[64, 32], f32[64, 1])
+ %17 = %16[3] : f8e4m3[64, 32]
+ %18 = %16[4] : f32[64, 1]
+ %19 = permute(%18, [1, 0]) : f32[1, 64]
+ %20 = permute(%17, [1, 0]) : f8e4m3[32, 64]
+ %21 = _scaled_mm(%14, %20, %15, %19, None, None, bf16, True) : bf16[8, 64]
+ return [%21]""")


def test_blocks_on_blackwell():
    assert_expected_inline(lowered("sm_100", "mxfp8", disable_kernels=["cutlass"]).text, """\
  %3 = %2[0] : f8e4m3[8, 32]
  %4 = %2[1] : u8[8, 1]
  %6 = %5[0] : f8e4m3[64, 32]
  %7 = %5[1] : u8[64, 1]
- %8 = scaled_mm(%3, %4, %6, %7, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
- return [%8]
+ %10 = swizzle_scales(%4, 1) : u8[512]
+ %11 = swizzle_scales(%7, 1) : u8[512]
+ %12 = library_scaled_mm(%3, %10, %6, %11, 'mxf8', 'mxf8', bf16, None) : bf16[8, 64]
+ return [%12]""")


def test_products_of_integers():
    assert_expected_inline(lowered("sm_90", "int8").text, """\
  %1 = %0[0] : i8[8, 32]
  %2 = %0[1] : f32[8, 1]
  %4 = %3[0] : i8[64, 32]
  %5 = %3[1] : f32[1, 1]
- %6 = scaled_mm(%1, %2, %4, %5, 'int8/row fp32 amax nearest', 'int8/tensor fp32 amax nearest', bf16) : bf16[8, 64]
- return [%6]
+ %8 = int_mm(%1, %4) : f32[8, 64]
+ %9 = mul(%8, %2) : f32[8, 64]
+ %10 = permute(%5, [1, 0]) : f32[1, 1]
+ %11 = mul(%9, %10) : f32[8, 64]
+ %12 = convert_element_type(%11, bf16) : bf16[8, 64]
+ return [%12]""")


def test_nothing_to_what_inductor_inlines():
    change = lowered("cpu", "mxfp8")
    assert not change.text and {record.kernel for record in change.records} == {"inductor"}


def test_nothing_where_no_kernel_is_left():
    change = lowered("sm_90", "mxfp8", disable_kernels=registry.NAMES)
    assert not change.text and "no kernel took it (cpp: disabled" in change.decisions
