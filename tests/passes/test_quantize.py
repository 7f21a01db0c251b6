"""``quantize`` and ``delayed``: quantisers on the operands, and what the next step has to know of them."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline


def frozen(recipe):
    return around("quantize", linear(trained=False), matrix(8, 32), policy=recipe).text


def test_both_operands_are_quantised_along_what_is_contracted():
    with torch.no_grad():
        assert_expected_inline(around("quantize", linear(), matrix(8, 32), policy="mxfp8").text, """\
  %0 = permute(%1, [1, 0]) : bf16[64, 32]
- %2 = permute(%0, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
- return [%3]
+ %4 = quantize(x, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 32], u8[8, 1], u8[0])
+ %5 = %4[0] : f8e4m3[8, 32]
+ %6 = %4[1] : u8[8, 1]
+ %7 = quantize(%0, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[64, 32], u8[64, 1], u8[0])
+ %8 = %7[0] : f8e4m3[64, 32]
+ %9 = %7[1] : u8[64, 1]
+ %10 = scaled_mm(%5, %6, %8, %9, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
+ return [%10]""")


def test_backward_quantises_the_tensors_themselves():
    assert_expected_inline(frozen("mxfp8"), """\
  %0 = permute(%1, [1, 0]) : bf16[64, 32]
  %2 = permute(%3, [1, 0]) : bf16[32, 64] | bwd!
- %4 = permute(%0, [1, 0]) : bf16[32, 64]
- %5 = mm(x, %4) : bf16[8, 64]
+ %6 = quantize(x, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 32], u8[8, 1], u8[0])
+ %7 = %6[0] : f8e4m3[8, 32]
+ %8 = %6[1] : u8[8, 1]
+ %9 = quantize(%0, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[64, 32], u8[64, 1], u8[0])
+ %10 = %9[0] : f8e4m3[64, 32]
+ %11 = %9[1] : u8[64, 1]
+ %12 = scaled_mm(%7, %8, %10, %11, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
- %13 = permute(%2, [1, 0]) : bf16[64, 32] | bwd!
- %14 = mm(g, %13) : bf16[8, 32] | bwd!
- return [%5, None, %14]
+ %15 = quantize(g, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 64], u8[8, 2], u8[0]) | bwd!
+ %16 = %15[0] : f8e4m3[8, 64] | bwd!
+ %17 = %15[1] : u8[8, 2] | bwd!
+ %18 = quantize(%2, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[32, 64], u8[32, 2], u8[0]) | bwd!
+ %19 = %18[0] : f8e4m3[32, 64] | bwd!
+ %20 = %18[1] : u8[32, 2] | bwd!
+ %21 = scaled_mm(%16, %17, %19, %20, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 32] | bwd!
+ return [%12, None, %21]""")


def test_backward_starts_from_the_codes_of_forward_and_draws_its_own_bits():
    assert_expected_inline(frozen("tetrajet"), """\
  %0 = permute(%1, [1, 0]) : bf16[64, 32]
+ %2 = seed('cpu', False) : i64[1] | must_save
- %3 = permute(%0, [1, 0]) : bf16[32, 64]
- %4 = mm(x, %3) : bf16[8, 64]
+ %5 = quantize(x, 'e2m1/32 e8m0 ceil nearest', None, 0) : (u8[8, 16], u8[8, 1], u8[0])
+ %6 = %5[0] : u8[8, 16]
+ %7 = %5[1] : u8[8, 1]
+ %8 = quantize(%0, 'e2m1/32 e8m0 ceil nearest', None, 0) : (u8[64, 16], u8[64, 1], u8[0])
+ %9 = %8[0] : u8[64, 16]
+ %10 = %8[1] : u8[64, 1]
+ %11 = scaled_mm(%6, %7, %9, %10, 'e2m1/32 e8m0 ceil nearest', 'e2m1/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
- %12 = permute(%0, [1, 0]) : bf16[32, 64] | bwd!
- %13 = permute(%12, [1, 0]) : bf16[64, 32] | bwd!
- %14 = mm(g, %13) : bf16[8, 32] | bwd!
- return [%4, None, %14]
+ %15 = dequantize(%9, %10, 'e2m1/32 e8m0 ceil nearest', bf16) : bf16[64, 32] | bwd!
+ %12 = permute(%15, [1, 0]) : bf16[32, 64] | bwd!
+ %16 = quantize(g, 'e2m1/32 e8m0 ceil stochastic', %2, 1) : (u8[8, 32], u8[8, 2], u8[0]) | bwd!
+ %17 = %16[0] : u8[8, 32] | bwd!
+ %18 = %16[1] : u8[8, 2] | bwd!
+ %19 = quantize(%12, 'e2m1/32 e8m0 ceil stochastic', %2, 2) : (u8[32, 32], u8[32, 2], u8[0]) | bwd!
+ %20 = %19[0] : u8[32, 32] | bwd!
+ %21 = %19[1] : u8[32, 2] | bwd!
+ %22 = scaled_mm(%17, %18, %20, %21, 'e2m1/32 e8m0 ceil stochastic', 'e2m1/32 e8m0 ceil stochastic', bf16) : bf16[8, 32] | bwd!
+ return [%11, None, %22]""")


def test_codes_with_one_scale_are_transposed():
    assert_expected_inline(frozen("fp8"), """\
- %0 = permute(weight, [1, 0]) : bf16[32, 64]
- %1 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
+ %4 = quantize(x, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 32], f32[1, 1], u8[0])
+ %5 = %4[0] : f8e4m3[8, 32]
+ %6 = %4[1] : f32[1, 1]
+ %7 = quantize(weight, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[64, 32], f32[1, 1], u8[0])
+ %8 = %7[0] : f8e4m3[64, 32]
+ %9 = %7[1] : f32[1, 1]
+ %10 = scaled_mm(%5, %6, %8, %9, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 64]
- %11 = permute(%1, [1, 0]) : bf16[32, 64] | bwd!
- %12 = permute(%11, [1, 0]) : bf16[64, 32] | bwd!
- %13 = mm(g, %12) : bf16[8, 32] | bwd!
- return [%3, None, %13]
+ %14 = permute(%8, [1, 0]) : f8e4m3[32, 64] | bwd!
+ %15 = quantize(g, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 64], f32[1, 1], u8[0]) | bwd!
+ %16 = %15[0] : f8e4m3[8, 64] | bwd!
+ %17 = %15[1] : f32[1, 1] | bwd!
+ %18 = scaled_mm(%16, %17, %14, %9, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32] | bwd!
+ return [%10, None, %18]""")


def test_what_forward_clipped_has_no_gradient():
    assert_expected_inline(frozen("quartet-paper"), """\
  %0 = seed('cpu', False) : i64[1] | must_save
  %1 = hadamard(x, 32, None, False, f32) : f32[8, 32]
  %2 = hadamard(%3, 32, None, False, f32) : f32[64, 32]
  %4 = hadamard(g, 32, %5, False, f32) : f32[8, 64] | bwd!
  %6 = hadamard(%7, 32, %5, False, f32) : f32[32, 64] | bwd!
- %8 = permute(%2, [1, 0]) : f32[32, 64]
- %9 = mm(%1, %8) : f32[8, 64]
- %10 = convert_element_type(%9, bf16) : bf16[8, 64]
+ %11 = quantize(%1, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', None, 0) : (u8[8, 16], u8[8, 1], u8[8, 4])
+ %12 = %11[0] : u8[8, 16]
+ %13 = %11[1] : u8[8, 1]
+ %14 = %11[2] : u8[8, 4]
+ %15 = quantize(%2, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', None, 0) : (u8[64, 16], u8[64, 1], u8[64, 4])
+ %16 = %15[0] : u8[64, 16]
+ %17 = %15[1] : u8[64, 1]
+ %18 = scaled_mm(%12, %13, %16, %17, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', 'e2m1/32 e8m0 quest(centred,floor) nearest mask', bf16) : bf16[8, 64]
- %7 = permute(%2, [1, 0]) : f32[32, 64] | bwd!
+ %19 = dequantize(%16, %17, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', f32) : f32[64, 32] | bwd!
+ %7 = permute(%19, [1, 0]) : f32[32, 64] | bwd!
- %20 = permute(%6, [1, 0]) : f32[64, 32] | bwd!
- %21 = mm(%4, %20) : f32[8, 32] | bwd!
- %22 = convert_element_type(%21, bf16) : bf16[8, 32] | bwd!
- %23 = hadamard(%22, 32, None, True, bf16) : bf16[8, 32] | bwd!
- return [%10, None, %23]
+ %24 = quantize(%4, 'e2m1/32 e8m0 headroom stochastic', %0, 1) : (u8[8, 32], u8[8, 2], u8[0]) | bwd!
+ %25 = %24[0] : u8[8, 32] | bwd!
+ %26 = %24[1] : u8[8, 2] | bwd!
+ %27 = quantize(%6, 'e2m1/32 e8m0 headroom stochastic', %0, 2) : (u8[32, 32], u8[32, 2], u8[0]) | bwd!
+ %28 = %27[0] : u8[32, 32] | bwd!
+ %29 = %27[1] : u8[32, 2] | bwd!
+ %30 = scaled_mm(%25, %26, %28, %29, 'e2m1/32 e8m0 headroom stochastic', 'e2m1/32 e8m0 headroom stochastic', bf16) : bf16[8, 32] | bwd!
+ %31 = apply_mask(%30, %14) : bf16[8, 32] | bwd!
+ %23 = hadamard(%31, 32, None, True, bf16) : bf16[8, 32] | bwd!
+ return [%18, None, %23]""")


def test_straight_through_multiplies_what_forward_quantised():
    assert_expected_inline(frozen("bitnet"), """\
  %0 = mm(g, %1) : bf16[8, 32] | bwd!
- %2 = permute(weight, [1, 0]) : bf16[32, 64]
- %3 = permute(%2, [1, 0]) : bf16[64, 32]
- %4 = permute(%3, [1, 0]) : bf16[32, 64]
- %5 = mm(x, %4) : bf16[8, 64]
+ %6 = quantize(x, 'int8/row fp32 amax nearest', None, 0) : (i8[8, 32], f32[8, 1], u8[0])
+ %7 = %6[0] : i8[8, 32]
+ %8 = %6[1] : f32[8, 1]
+ %9 = quantize(weight, 'ternary/tensor fp32 absmean nearest', None, 0) : (i8[64, 32], f32[1, 1], u8[0])
+ %10 = %9[0] : i8[64, 32]
+ %11 = %9[1] : f32[1, 1]
+ %12 = scaled_mm(%7, %8, %10, %11, 'int8/row fp32 amax nearest', 'ternary/tensor fp32 absmean nearest', bf16) : bf16[8, 64]
- %13 = permute(%3, [1, 0]) : bf16[32, 64] | bwd!
+ %14 = dequantize(%10, %11, 'ternary/tensor fp32 absmean nearest', bf16) : bf16[64, 32] | bwd!
+ %13 = permute(%14, [1, 0]) : bf16[32, 64] | bwd!
- return [%5, None, %0]
+ return [%12, None, %0]""")


def test_a_slot_for_each_operand_scales_by_earlier_steps():
    with torch.no_grad():
        assert_expected_inline(around("quantize", linear(), matrix(8, 32), policy="fp8-delayed").text, """\
- %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = permute(%0, [1, 0]) : bf16[64, 32]
- %2 = permute(%1, [1, 0]) : bf16[32, 64]
- %3 = mm(x, %2) : bf16[8, 64]
- return [%3]
+ %4 = amax_read(anchor, '0.x/1024 0.w/1024', cpu) : f32[2] | !
+ %5 = amax(weight) : f32[1, 1]
+ %6 = slice(%4, 0, 1, 2) : f32[1]
+ %7 = view(%6, [1, 1]) : f32[1, 1]
+ %8 = gt(%7, 0) : b8[1, 1]
+ %9 = where(%8, %7, %5) : f32[1, 1]
+ %10 = amax(x) : f32[1, 1]
+ %11 = slice(%4, 0, 0, 1) : f32[1]
+ %12 = view(%11, [1, 1]) : f32[1, 1]
+ %13 = gt(%12, 0) : b8[1, 1]
+ %14 = where(%13, %12, %10) : f32[1, 1]
+ %15 = quantize(x, 'e4m3/tensor fp32 delayed nearest', None, 0, %14) : (f8e4m3[8, 32], f32[1, 1], u8[0])
+ %16 = %15[0] : f8e4m3[8, 32]
+ %17 = %15[1] : f32[1, 1]
+ %18 = quantize(weight, 'e4m3/tensor fp32 delayed nearest', None, 0, %9) : (f8e4m3[64, 32], f32[1, 1], u8[0])
+ %19 = %18[0] : f8e4m3[64, 32]
+ %20 = %18[1] : f32[1, 1]
+ %21 = scaled_mm(%16, %17, %19, %20, 'e4m3/tensor fp32 delayed nearest', 'e4m3/tensor fp32 delayed nearest', bf16) : bf16[8, 64]
+ return [%21]""")


def test_delayed_records_at_the_end_of_forward_and_of_backward():
    change = around("delayed", linear(trained=False), matrix(8, 32), policy="fp8-delayed")
    assert_expected_inline(change.text, """\
  %0 = amax_begin(anchor, '0.x/1024 0.w/1024 0.e/1024', cpu) : f32[3] | !
  %1 = amax(g) : f32[1, 1] | bwd!
  %2 = amax(weight) : f32[1, 1]
  %3 = amax(x) : f32[1, 1]
+ %4 = amax_seen(%0, 2) : f32[2] | must_save
+ %5 = amax_record(anchor, '0.x/1024 0.w/1024 0.e/1024', [0, 1, 2], [%4, %1]) : None | bwd!
+ %6 = amax_note(%4, 0, [%3, %2]) : None | !""")


def test_delayed_records_nothing_without_backward_or_history():
    assert not around("delayed", linear(), matrix(8, 32), policy="fp8").text
    with torch.no_grad():
        assert not around("delayed", linear(), matrix(8, 32), policy="fp8-delayed").text
