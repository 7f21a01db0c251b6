"""``estimator``, ``toward`` and ``outliers``: what single recipes make of weights, their gradients and X."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline


def test_estimator_multiplies_the_weights_gradient_by_the_slope_of_its_quantiser():
    assert_expected_inline(around("estimator", linear(), matrix(8, 32, grad=False), policy="fp4-dge").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
  %2 = %1[0] : bf16[8, 32]
  %12 = permute(%11, [1, 0]) : bf16[64, 32] | bwd!
- %9 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
- %10 = mm(%9, %2) : bf16[64, 32] | bwd!
+ %17 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %18 = mm(%17, %2) : bf16[64, 32] | bwd!
+ %19 = permute(%0, [1, 0]) : bf16[64, 32] | bwd!
+ %20 = dge(%19, 'e2m1/row fp32 amax nearest') : f32[64, 32] | bwd!
+ %21 = convert_element_type(%18, f32) : f32[64, 32] | bwd!
+ %22 = mul(%21, %20) : f32[64, 32] | bwd!
+ %23 = convert_element_type(%22, bf16) : bf16[64, 32] | bwd!
- %13 = add(%10, %12) : bf16[64, 32] | bwd!
+ %13 = add(%23, %12) : bf16[64, 32] | bwd!""")


def test_estimator_does_nothing_where_the_weight_has_no_gradient_or_the_recipe_none():
    assert not around("estimator", linear(trained=False), matrix(8, 32), policy="fp4-dge").text
    assert not around("estimator", linear(), matrix(8, 32), policy="fp8").text


def test_toward_moves_the_weight_to_the_side_of_its_average():
    assert_expected_inline(around("toward", linear(), matrix(8, 32), policy="tetrajet-ema").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
  %7 = mm(g, %5) : bf16[8, 32] | bwd
  %8 = permute(%4, [1, 0]) : bf16[64, 32] | bwd
- %1 = mm(x, %0) : bf16[8, 64]
+ %10 = average_advance(anchor, weight, 0, 'w', 0.998) : None | !
+ %11 = average_read(anchor, weight, 0, 'w', 0.998) : f32[64, 32]
+ %12 = permute(%0, [1, 0]) : bf16[64, 32]
+ %13 = toward(%12, %11, 'e2m1/32 e8m0 ceil nearest') : bf16[64, 32]
+ %14 = permute(%13, [1, 0]) : bf16[32, 64]
+ %15 = mm(x, %14) : bf16[8, 64]
- return [%1, %8, %7, None]
+ return [%15, %8, %7, None]""")


def test_toward_only_reads_the_average_without_backward():
    with torch.no_grad():
        assert_expected_inline(around("toward", linear(), matrix(8, 32), policy="tetrajet-ema").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = mm(x, %0) : bf16[8, 64] | ?
- return [%1]
+ %3 = average_read(anchor, weight, 0, 'w', 0.998) : f32[64, 32]
+ %4 = permute(%0, [1, 0]) : bf16[64, 32]
+ %5 = toward(%4, %3, 'e2m1/32 e8m0 ceil nearest') : bf16[64, 32]
+ %6 = permute(%5, [1, 0]) : bf16[32, 64]
+ %7 = mm(x, %6) : bf16[8, 64]
+ return [%7]""")


def test_toward_does_nothing_where_the_recipe_has_no_average():
    assert not around("toward", linear(), matrix(8, 32), policy="tetrajet").text


def test_outliers_are_multiplied_apart():
    with torch.no_grad():
        assert_expected_inline(around("outliers", linear(), matrix(8, 32), policy="fp4-dge").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = mm(x, %0) : bf16[8, 64] | ?
- return [%1]
+ %3 = split_outliers(x, 0.99) : (bf16[8, 32], bf16[4], i32[4], i32[9])
+ %4 = %3[0] : bf16[8, 32]
+ %5 = %3[1] : bf16[4]
+ %6 = %3[2] : i32[4]
+ %7 = %3[3] : i32[9]
+ %8 = mm(%4, %0) : bf16[8, 64]
+ %9 = sparse_mm(%5, %6, %7, %0, 32, False) : bf16[8, 64]
+ %10 = add(%8, %9) : bf16[8, 64]
+ return [%10]""")


def test_outliers_in_wgrad_too():
    assert_expected_inline(around("outliers", linear(), matrix(8, 32, grad=False), policy="fp4-dge").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
  %5 = permute(%4, [1, 0]) : bf16[64, 32] | bwd
- %1 = mm(x, %0) : bf16[8, 64]
- %2 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %3 = mm(%2, x) : bf16[64, 32] | bwd
- %4 = permute(%3, [1, 0]) : bf16[32, 64] | bwd
+ %7 = split_outliers(x, 0.99) : (bf16[8, 32], bf16[4], i32[4], i32[9])
+ %8 = %7[0] : bf16[8, 32]
+ %9 = %7[1] : bf16[4]
+ %10 = %7[2] : i32[4]
+ %11 = %7[3] : i32[9]
+ %12 = mm(%8, %0) : bf16[8, 64]
+ %13 = sparse_mm(%9, %10, %11, %0, 32, False) : bf16[8, 64]
+ %14 = add(%12, %13) : bf16[8, 64]
+ %15 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %16 = mm(%15, %8) : bf16[64, 32] | bwd!
+ %17 = sparse_mm(%9, %10, %11, g, 32, True) : bf16[32, 64] | bwd!
+ %18 = permute(%17, [1, 0]) : bf16[64, 32] | bwd!
+ %19 = add(%16, %18) : bf16[64, 32] | bwd!
+ %4 = permute(%19, [1, 0]) : bf16[32, 64] | bwd
- return [%1, %5, None]
+ return [%14, %5, None]""")


def test_outliers_does_nothing_where_the_recipe_keeps_none():
    assert not around("outliers", linear(), matrix(8, 32), policy="fp8").text

