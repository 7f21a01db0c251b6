"""``quantize`` and ``delayed``: quantisers on the operands, and what the next step has to know of them."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline


def frozen(recipe):
    return around("quantize", linear(trained=False), matrix(8, 32), policy=recipe).text


def test_both_operands_are_quantised_along_what_is_contracted():
    with torch.no_grad():
        assert_expected_inline(around("quantize", linear(), matrix(8, 32), policy="mxfp8").text, """\
  %1 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
- return [%3]
+ %5 = quantize(x, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 32], u8[8, 1], u8[0])
+ %6 = %5[0] : f8e4m3[8, 32]
+ %7 = %5[1] : u8[8, 1]
+ %8 = quantize(%1, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[64, 32], u8[64, 1], u8[0])
+ %9 = %8[0] : f8e4m3[64, 32]
+ %10 = %8[1] : u8[64, 1]
+ %11 = scaled_mm(%6, %7, %9, %10, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
+ return [%11]""")


def test_backward_quantises_the_tensors_themselves():
    assert_expected_inline(frozen("mxfp8"), """\
  %1 = permute(%0, [1, 0]) : bf16[64, 32]
  %6 = permute(%5, [1, 0]) : bf16[32, 64] | bwd!
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
+ %10 = quantize(x, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 32], u8[8, 1], u8[0])
+ %11 = %10[0] : f8e4m3[8, 32]
+ %12 = %10[1] : u8[8, 1]
+ %13 = quantize(%1, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[64, 32], u8[64, 1], u8[0])
+ %14 = %13[0] : f8e4m3[64, 32]
+ %15 = %13[1] : u8[64, 1]
+ %16 = scaled_mm(%11, %12, %14, %15, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
- %7 = permute(%6, [1, 0]) : bf16[64, 32] | bwd!
- %8 = mm(g, %7) : bf16[8, 32] | bwd!
- return [%3, None, %8]
+ %17 = quantize(g, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 64], u8[8, 2], u8[0]) | bwd!
+ %18 = %17[0] : f8e4m3[8, 64] | bwd!
+ %19 = %17[1] : u8[8, 2] | bwd!
+ %20 = quantize(%6, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[32, 64], u8[32, 2], u8[0]) | bwd!
+ %21 = %20[0] : f8e4m3[32, 64] | bwd!
+ %22 = %20[1] : u8[32, 2] | bwd!
+ %23 = scaled_mm(%18, %19, %21, %22, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 32] | bwd!
+ return [%16, None, %23]""")


def test_backward_starts_from_the_codes_of_forward_and_draws_its_own_bits():
    assert_expected_inline(frozen("tetrajet"), """\
  %1 = permute(%0, [1, 0]) : bf16[64, 32]
+ %9 = seed(cpu, False) : i64[1] | must_save
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
+ %10 = quantize(x, 'e2m1/32 e8m0 ceil nearest', None, 0) : (u8[8, 16], u8[8, 1], u8[0])
+ %11 = %10[0] : u8[8, 16]
+ %12 = %10[1] : u8[8, 1]
+ %13 = quantize(%1, 'e2m1/32 e8m0 ceil nearest', None, 0) : (u8[64, 16], u8[64, 1], u8[0])
+ %14 = %13[0] : u8[64, 16]
+ %15 = %13[1] : u8[64, 1]
+ %16 = scaled_mm(%11, %12, %14, %15, 'e2m1/32 e8m0 ceil nearest', 'e2m1/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
- %5 = permute(%1, [1, 0]) : bf16[32, 64] | bwd!
- %6 = permute(%5, [1, 0]) : bf16[64, 32] | bwd!
- %7 = mm(g, %6) : bf16[8, 32] | bwd!
- return [%3, None, %7]
+ %17 = dequantize(%14, %15, 'e2m1/32 e8m0 ceil nearest', bf16) : bf16[64, 32] | bwd!
+ %5 = permute(%17, [1, 0]) : bf16[32, 64] | bwd!
+ %18 = quantize(g, 'e2m1/32 e8m0 ceil stochastic', %9, 1) : (u8[8, 32], u8[8, 2], u8[0]) | bwd!
+ %19 = %18[0] : u8[8, 32] | bwd!
+ %20 = %18[1] : u8[8, 2] | bwd!
+ %21 = quantize(%5, 'e2m1/32 e8m0 ceil stochastic', %9, 2) : (u8[32, 32], u8[32, 2], u8[0]) | bwd!
+ %22 = %21[0] : u8[32, 32] | bwd!
+ %23 = %21[1] : u8[32, 2] | bwd!
+ %24 = scaled_mm(%19, %20, %22, %23, 'e2m1/32 e8m0 ceil stochastic', 'e2m1/32 e8m0 ceil stochastic', bf16) : bf16[8, 32] | bwd!
+ return [%16, None, %24]""")


def test_codes_with_one_scale_are_transposed():
    assert_expected_inline(frozen("fp8"), """\
- %0 = permute(weight, [1, 0]) : bf16[32, 64]
- %1 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
+ %9 = quantize(x, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 32], f32[1, 1], u8[0])
+ %10 = %9[0] : f8e4m3[8, 32]
+ %11 = %9[1] : f32[1, 1]
+ %12 = quantize(weight, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[64, 32], f32[1, 1], u8[0])
+ %13 = %12[0] : f8e4m3[64, 32]
+ %14 = %12[1] : f32[1, 1]
+ %15 = scaled_mm(%10, %11, %13, %14, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 64]
- %5 = permute(%1, [1, 0]) : bf16[32, 64] | bwd!
- %6 = permute(%5, [1, 0]) : bf16[64, 32] | bwd!
- %7 = mm(g, %6) : bf16[8, 32] | bwd!
- return [%3, None, %7]
+ %16 = permute(%13, [1, 0]) : f8e4m3[32, 64] | bwd!
+ %17 = quantize(g, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 64], f32[1, 1], u8[0]) | bwd!
+ %18 = %17[0] : f8e4m3[8, 64] | bwd!
+ %19 = %17[1] : f32[1, 1] | bwd!
+ %20 = scaled_mm(%18, %19, %16, %14, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32] | bwd!
+ return [%15, None, %20]""")


def test_what_forward_clipped_has_no_gradient():
    assert_expected_inline(frozen("quartet-paper"), """\
  %0 = seed(cpu, False) : i64[1] | must_save
  %2 = hadamard(x, 32, None, False, f32) : f32[8, 32]
  %4 = hadamard(%3, 32, None, False, f32) : f32[64, 32]
  %10 = hadamard(g, 32, %9, False, f32) : f32[8, 64] | bwd!
  %12 = hadamard(%11, 32, %9, False, f32) : f32[32, 64] | bwd!
- %5 = permute(%4, [1, 0]) : f32[32, 64]
- %6 = mm(%2, %5) : f32[8, 64]
- %7 = convert_element_type(%6, bf16) : bf16[8, 64]
+ %18 = quantize(%2, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', None, 0) : (u8[8, 16], u8[8, 1], u8[8, 4])
+ %19 = %18[0] : u8[8, 16]
+ %20 = %18[1] : u8[8, 1]
+ %21 = %18[2] : u8[8, 4]
+ %22 = quantize(%4, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', None, 0) : (u8[64, 16], u8[64, 1], u8[64, 4])
+ %23 = %22[0] : u8[64, 16]
+ %24 = %22[1] : u8[64, 1]
+ %25 = scaled_mm(%19, %20, %23, %24, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', 'e2m1/32 e8m0 quest(centred,floor) nearest mask', bf16) : bf16[8, 64]
- %11 = permute(%4, [1, 0]) : f32[32, 64] | bwd!
+ %26 = dequantize(%23, %24, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', f32) : f32[64, 32] | bwd!
+ %11 = permute(%26, [1, 0]) : f32[32, 64] | bwd!
- %13 = permute(%12, [1, 0]) : f32[64, 32] | bwd!
- %14 = mm(%10, %13) : f32[8, 32] | bwd!
- %15 = convert_element_type(%14, bf16) : bf16[8, 32] | bwd!
- %16 = hadamard(%15, 32, None, True, bf16) : bf16[8, 32] | bwd!
- return [%7, None, %16]
+ %27 = quantize(%10, 'e2m1/32 e8m0 headroom stochastic', %0, 1) : (u8[8, 32], u8[8, 2], u8[0]) | bwd!
+ %28 = %27[0] : u8[8, 32] | bwd!
+ %29 = %27[1] : u8[8, 2] | bwd!
+ %30 = quantize(%12, 'e2m1/32 e8m0 headroom stochastic', %0, 2) : (u8[32, 32], u8[32, 2], u8[0]) | bwd!
+ %31 = %30[0] : u8[32, 32] | bwd!
+ %32 = %30[1] : u8[32, 2] | bwd!
+ %33 = scaled_mm(%28, %29, %31, %32, 'e2m1/32 e8m0 headroom stochastic', 'e2m1/32 e8m0 headroom stochastic', bf16) : bf16[8, 32] | bwd!
+ %34 = apply_mask(%33, %21) : bf16[8, 32] | bwd!
+ %16 = hadamard(%34, 32, None, True, bf16) : bf16[8, 32] | bwd!
+ return [%25, None, %16]""")


def test_straight_through_multiplies_what_forward_quantised():
    assert_expected_inline(frozen("bitnet"), """\
  %7 = mm(g, %6) : bf16[8, 32] | bwd!
- %0 = permute(weight, [1, 0]) : bf16[32, 64]
- %1 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
+ %9 = quantize(x, 'int8/row fp32 amax nearest', None, 0) : (i8[8, 32], f32[8, 1], u8[0])
+ %10 = %9[0] : i8[8, 32]
+ %11 = %9[1] : f32[8, 1]
+ %12 = quantize(weight, 'ternary/tensor fp32 absmean nearest', None, 0) : (i8[64, 32], f32[1, 1], u8[0])
+ %13 = %12[0] : i8[64, 32]
+ %14 = %12[1] : f32[1, 1]
+ %15 = scaled_mm(%10, %11, %13, %14, 'int8/row fp32 amax nearest', 'ternary/tensor fp32 absmean nearest', bf16) : bf16[8, 64]
- %5 = permute(%1, [1, 0]) : bf16[32, 64] | bwd!
+ %16 = dequantize(%13, %14, 'ternary/tensor fp32 absmean nearest', bf16) : bf16[64, 32] | bwd!
+ %5 = permute(%16, [1, 0]) : bf16[32, 64] | bwd!
- return [%3, None, %7]
+ return [%15, None, %7]""")


def test_a_slot_for_each_operand_scales_by_earlier_steps():
    with torch.no_grad():
        assert_expected_inline(around("quantize", linear(), matrix(8, 32), policy="fp8-delayed").text, """\
- %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
- return [%3]
+ %5 = amax_read(anchor, '0.x/1024 0.w/1024', cpu) : f32[2] | !
+ %6 = amax(weight) : f32[1, 1]
+ %7 = slice(%5, 0, 1, 2) : f32[1]
+ %8 = view(%7, [1, 1]) : f32[1, 1]
+ %9 = gt(%8, 0) : b8[1, 1]
+ %10 = where(%9, %8, %6) : f32[1, 1]
+ %11 = amax(x) : f32[1, 1]
+ %12 = slice(%5, 0, 0, 1) : f32[1]
+ %13 = view(%12, [1, 1]) : f32[1, 1]
+ %14 = gt(%13, 0) : b8[1, 1]
+ %15 = where(%14, %13, %11) : f32[1, 1]
+ %16 = quantize(x, 'e4m3/tensor fp32 delayed nearest', None, 0, %15) : (f8e4m3[8, 32], f32[1, 1], u8[0])
+ %17 = %16[0] : f8e4m3[8, 32]
+ %18 = %16[1] : f32[1, 1]
+ %19 = quantize(weight, 'e4m3/tensor fp32 delayed nearest', None, 0, %10) : (f8e4m3[64, 32], f32[1, 1], u8[0])
+ %20 = %19[0] : f8e4m3[64, 32]
+ %21 = %19[1] : f32[1, 1]
+ %22 = scaled_mm(%17, %18, %20, %21, 'e4m3/tensor fp32 delayed nearest', 'e4m3/tensor fp32 delayed nearest', bf16) : bf16[8, 64]
+ return [%22]""")


def test_delayed_records_at_the_end_of_forward_and_of_backward():
    change = around("delayed", linear(trained=False), matrix(8, 32), policy="fp8-delayed")
    assert_expected_inline(change.text, """\
  %1 = amax(g) : f32[1, 1] | bwd!
  %6 = amax(weight) : f32[1, 1]
  %11 = amax(x) : f32[1, 1]
+ %30 = amax_record(anchor, '0.x/1024 0.w/1024 0.e/1024', [2], [%1]) : None | bwd!
+ %31 = amax_record(anchor, '0.x/1024 0.w/1024 0.e/1024', [0, 1], [%11, %6]) : None | !""")


def test_delayed_records_nothing_without_backward_or_history():
    assert not around("delayed", linear(), matrix(8, 32), policy="fp8").text
    with torch.no_grad():
        assert not around("delayed", linear(), matrix(8, 32), policy="fp8-delayed").text
