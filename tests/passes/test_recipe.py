"""``smooth_swiglu``, ``outliers``, ``estimator`` and ``toward``: what single recipes make of X, W and its gradient."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn

import quartet

CHANNEL = quartet.recipes()["fp8-trillion"]
TOKEN = replace(CHANNEL, name="per token", smooth="token")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = linear()

    def forward(self, a, b):
        return self.down(F.silu(a) * b)


def smoothed(recipe, model=None):
    """What changes of the products, in bf16; how s is made of magnitudes, ``tests/scenarios`` checks."""
    change = around("smooth_swiglu", model or Gated(), matrix(8, 32, grad=False), matrix(8, 32),
                    policy=quartet.Policy(recipe).on("linear", recipe))
    return "\n".join(line for line in change.text.splitlines() if ": bf16" in line)


def test_smooth_swiglu_by_channels_the_weight_takes_it():
    assert_expected_inline(smoothed(CHANNEL), """\
  %5 = convert_element_type(%4, bf16) : bf16[8, 32]
  %6 = mul(%5, x1) : bf16[8, 32]
  %7 = permute(down.weight, [1, 0]) : bf16[32, 64]
  %15 = permute(%11, [1, 0]) : bf16[64, 32] | bwd
- %8 = mm(%6, %7) : bf16[8, 64]
- %9 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %10 = mm(%9, %6) : bf16[64, 32] | bwd
- %11 = permute(%10, [1, 0]) : bf16[32, 64] | bwd
- %12 = permute(%7, [1, 0]) : bf16[64, 32] | bwd
+ %18 = abs(x1) : bf16[8, 32]
+ %19 = amax(%18, [0], True) : bf16[1, 32]
+ %20 = view(%19, [1, -1]) : bf16[1, 32]
+ %41 = convert_element_type(%36, bf16) : bf16[1, 32]
+ %42 = mul(%6, %41) : bf16[8, 32]
+ %43 = permute(%7, [1, 0]) : bf16[64, 32]
+ %44 = convert_element_type(%40, bf16) : bf16[1, 32]
+ %45 = mul(%43, %44) : bf16[64, 32]
+ %46 = permute(%45, [1, 0]) : bf16[32, 64]
+ %47 = mm(%42, %46) : bf16[8, 64]
+ %48 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %49 = mm(%48, %42) : bf16[64, 32] | bwd!
+ %50 = convert_element_type(%40, bf16) : bf16[1, 32] | bwd!
+ %51 = mul(%49, %50) : bf16[64, 32] | bwd!
+ %11 = permute(%51, [1, 0]) : bf16[32, 64] | bwd
- %14 = mm(g, %12) : bf16[8, 32] | bwd
+ %52 = mm(g, %45) : bf16[8, 32] | bwd!
+ %53 = convert_element_type(%36, bf16) : bf16[1, 32] | bwd!
+ %54 = mul(%52, %53) : bf16[8, 32] | bwd!
- %16 = mul(%14, %5) : bf16[8, 32] | bwd
+ %16 = mul(%54, %5) : bf16[8, 32] | bwd""")


def test_smooth_swiglu_by_tokens_the_result_takes_it():
    assert_expected_inline(smoothed(TOKEN), """\
  %5 = convert_element_type(%4, bf16) : bf16[8, 32]
  %6 = mul(%5, x1) : bf16[8, 32]
  %7 = permute(down.weight, [1, 0]) : bf16[32, 64]
  %15 = permute(%11, [1, 0]) : bf16[64, 32] | bwd
- %8 = mm(%6, %7) : bf16[8, 64]
- %9 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %10 = mm(%9, %6) : bf16[64, 32] | bwd
- %11 = permute(%10, [1, 0]) : bf16[32, 64] | bwd
- %12 = permute(%7, [1, 0]) : bf16[64, 32] | bwd
+ %18 = abs(x1) : bf16[8, 32]
+ %19 = amax(%18, [-1], True) : bf16[8, 1]
+ %20 = view(%19, [-1, 1]) : bf16[8, 1]
+ %41 = convert_element_type(%36, bf16) : bf16[8, 1]
+ %42 = mul(%6, %41) : bf16[8, 32]
+ %43 = mm(%42, %7) : bf16[8, 64]
+ %44 = convert_element_type(%40, bf16) : bf16[8, 1]
+ %45 = mul(%43, %44) : bf16[8, 64]
+ %46 = convert_element_type(%40, bf16) : bf16[8, 1] | bwd!
+ %47 = mul(g, %46) : bf16[8, 64] | bwd!
+ %48 = permute(%47, [1, 0]) : bf16[64, 8] | bwd!
+ %49 = mm(%48, %42) : bf16[64, 32] | bwd!
+ %11 = permute(%49, [1, 0]) : bf16[32, 64] | bwd
- %14 = mm(g, %12) : bf16[8, 32] | bwd
+ %50 = permute(%7, [1, 0]) : bf16[64, 32] | bwd!
+ %51 = mm(%47, %50) : bf16[8, 32] | bwd!
+ %52 = convert_element_type(%36, bf16) : bf16[8, 1] | bwd!
+ %53 = mul(%51, %52) : bf16[8, 32] | bwd!
- %16 = mul(%14, %5) : bf16[8, 32] | bwd
+ %16 = mul(%53, %5) : bf16[8, 32] | bwd""")


def test_smooth_swiglu_does_nothing_where_x_is_no_gated_activation():
    class Ungated(Gated):
        def forward(self, a, b):
            return self.down(F.silu(a) + b)

    assert not smoothed(CHANNEL, Ungated())


def test_smooth_swiglu_does_nothing_where_the_recipe_asks_for_none():
    assert not smoothed(quartet.recipes()["fp8-delayed"])


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
