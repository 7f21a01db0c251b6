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
  %0 = convert_element_type(%1, bf16) : bf16[8, 32]
  %2 = mul(%0, x1) : bf16[8, 32]
  %3 = permute(down.weight, [1, 0]) : bf16[32, 64]
  %4 = permute(%5, [1, 0]) : bf16[64, 32] | bwd
- %6 = mm(%2, %3) : bf16[8, 64]
- %7 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %8 = mm(%7, %2) : bf16[64, 32] | bwd
- %5 = permute(%8, [1, 0]) : bf16[32, 64] | bwd
- %9 = permute(%3, [1, 0]) : bf16[64, 32] | bwd
+ %10 = abs(x1) : bf16[8, 32]
+ %11 = amax(%10, [0], True) : bf16[1, 32]
+ %12 = view(%11, [1, -1]) : bf16[1, 32]
+ %33 = convert_element_type(%28, bf16) : bf16[1, 32]
+ %34 = mul(%2, %33) : bf16[8, 32]
+ %35 = permute(%3, [1, 0]) : bf16[64, 32]
+ %36 = convert_element_type(%32, bf16) : bf16[1, 32]
+ %37 = mul(%35, %36) : bf16[64, 32]
+ %38 = permute(%37, [1, 0]) : bf16[32, 64]
+ %39 = mm(%34, %38) : bf16[8, 64]
+ %40 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %41 = mm(%40, %34) : bf16[64, 32] | bwd!
+ %42 = convert_element_type(%32, bf16) : bf16[1, 32] | bwd!
+ %43 = mul(%41, %42) : bf16[64, 32] | bwd!
+ %5 = permute(%43, [1, 0]) : bf16[32, 64] | bwd
- %44 = mm(g, %9) : bf16[8, 32] | bwd
+ %45 = mm(g, %37) : bf16[8, 32] | bwd!
+ %46 = convert_element_type(%28, bf16) : bf16[1, 32] | bwd!
+ %47 = mul(%45, %46) : bf16[8, 32] | bwd!
- %48 = mul(%44, %0) : bf16[8, 32] | bwd
+ %48 = mul(%47, %0) : bf16[8, 32] | bwd""")


def test_smooth_swiglu_by_tokens_the_result_takes_it():
    assert_expected_inline(smoothed(TOKEN), """\
  %0 = convert_element_type(%1, bf16) : bf16[8, 32]
  %2 = mul(%0, x1) : bf16[8, 32]
  %3 = permute(down.weight, [1, 0]) : bf16[32, 64]
  %4 = permute(%5, [1, 0]) : bf16[64, 32] | bwd
- %6 = mm(%2, %3) : bf16[8, 64]
- %7 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %8 = mm(%7, %2) : bf16[64, 32] | bwd
- %5 = permute(%8, [1, 0]) : bf16[32, 64] | bwd
- %9 = permute(%3, [1, 0]) : bf16[64, 32] | bwd
+ %10 = abs(x1) : bf16[8, 32]
+ %11 = amax(%10, [-1], True) : bf16[8, 1]
+ %12 = view(%11, [-1, 1]) : bf16[8, 1]
+ %33 = convert_element_type(%28, bf16) : bf16[8, 1]
+ %34 = mul(%2, %33) : bf16[8, 32]
+ %35 = mm(%34, %3) : bf16[8, 64]
+ %36 = convert_element_type(%32, bf16) : bf16[8, 1]
+ %37 = mul(%35, %36) : bf16[8, 64]
+ %38 = convert_element_type(%32, bf16) : bf16[8, 1] | bwd!
+ %39 = mul(g, %38) : bf16[8, 64] | bwd!
+ %40 = permute(%39, [1, 0]) : bf16[64, 8] | bwd!
+ %41 = mm(%40, %34) : bf16[64, 32] | bwd!
+ %5 = permute(%41, [1, 0]) : bf16[32, 64] | bwd
- %42 = mm(g, %9) : bf16[8, 32] | bwd
+ %43 = permute(%3, [1, 0]) : bf16[64, 32] | bwd!
+ %44 = mm(%39, %43) : bf16[8, 32] | bwd!
+ %45 = convert_element_type(%28, bf16) : bf16[8, 1] | bwd!
+ %46 = mul(%44, %45) : bf16[8, 32] | bwd!
- %47 = mul(%42, %0) : bf16[8, 32] | bwd
+ %47 = mul(%46, %0) : bf16[8, 32] | bwd""")


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
  %1 = %2[0] : bf16[8, 32]
  %3 = permute(%4, [1, 0]) : bf16[64, 32] | bwd!
- %5 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
- %6 = mm(%5, %1) : bf16[64, 32] | bwd!
+ %7 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %8 = mm(%7, %1) : bf16[64, 32] | bwd!
+ %9 = permute(%0, [1, 0]) : bf16[64, 32] | bwd!
+ %10 = dge(%9, 'e2m1/row fp32 amax nearest') : f32[64, 32] | bwd!
+ %11 = convert_element_type(%8, f32) : f32[64, 32] | bwd!
+ %12 = mul(%11, %10) : f32[64, 32] | bwd!
+ %13 = convert_element_type(%12, bf16) : bf16[64, 32] | bwd!
- %14 = add(%6, %3) : bf16[64, 32] | bwd!
+ %14 = add(%13, %3) : bf16[64, 32] | bwd!""")


def test_estimator_does_nothing_where_the_weight_has_no_gradient_or_the_recipe_none():
    assert not around("estimator", linear(trained=False), matrix(8, 32), policy="fp4-dge").text
    assert not around("estimator", linear(), matrix(8, 32), policy="fp8").text


def test_toward_moves_the_weight_to_the_side_of_its_average():
    assert_expected_inline(around("toward", linear(), matrix(8, 32), policy="tetrajet-ema").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
  %1 = mm(g, %2) : bf16[8, 32] | bwd
  %3 = permute(%4, [1, 0]) : bf16[64, 32] | bwd
- %5 = mm(x, %0) : bf16[8, 64]
+ %6 = average_advance(anchor, weight, 0, 'w', 0.998) : None | !
+ %7 = average_read(anchor, weight, 0, 'w', 0.998) : f32[64, 32]
+ %8 = permute(%0, [1, 0]) : bf16[64, 32]
+ %9 = toward(%8, %7, 'e2m1/32 e8m0 ceil nearest') : bf16[64, 32]
+ %10 = permute(%9, [1, 0]) : bf16[32, 64]
+ %11 = mm(x, %10) : bf16[8, 64]
- return [%5, %3, %1, None]
+ return [%11, %3, %1, None]""")


def test_toward_only_reads_the_average_without_backward():
    with torch.no_grad():
        assert_expected_inline(around("toward", linear(), matrix(8, 32), policy="tetrajet-ema").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = mm(x, %0) : bf16[8, 64] | ?
- return [%1]
+ %2 = average_read(anchor, weight, 0, 'w', 0.998) : f32[64, 32]
+ %3 = permute(%0, [1, 0]) : bf16[64, 32]
+ %4 = toward(%3, %2, 'e2m1/32 e8m0 ceil nearest') : bf16[64, 32]
+ %5 = permute(%4, [1, 0]) : bf16[32, 64]
+ %6 = mm(x, %5) : bf16[8, 64]
+ return [%6]""")


def test_toward_does_nothing_where_the_recipe_has_no_average():
    assert not around("toward", linear(), matrix(8, 32), policy="tetrajet").text


def test_outliers_are_multiplied_apart():
    with torch.no_grad():
        assert_expected_inline(around("outliers", linear(), matrix(8, 32), policy="fp4-dge").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = mm(x, %0) : bf16[8, 64] | ?
- return [%1]
+ %2 = split_outliers(x, 0.99) : (bf16[8, 32], bf16[4], i32[4], i32[9])
+ %3 = %2[0] : bf16[8, 32]
+ %4 = %2[1] : bf16[4]
+ %5 = %2[2] : i32[4]
+ %6 = %2[3] : i32[9]
+ %7 = mm(%3, %0) : bf16[8, 64]
+ %8 = sparse_mm(%4, %5, %6, %0, 32, False) : bf16[8, 64]
+ %9 = add(%7, %8) : bf16[8, 64]
+ return [%9]""")


def test_outliers_in_wgrad_too():
    assert_expected_inline(around("outliers", linear(), matrix(8, 32, grad=False), policy="fp4-dge").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
  %1 = permute(%2, [1, 0]) : bf16[64, 32] | bwd
- %3 = mm(x, %0) : bf16[8, 64]
- %4 = permute(g, [1, 0]) : bf16[64, 8] | bwd
- %5 = mm(%4, x) : bf16[64, 32] | bwd
- %2 = permute(%5, [1, 0]) : bf16[32, 64] | bwd
+ %6 = split_outliers(x, 0.99) : (bf16[8, 32], bf16[4], i32[4], i32[9])
+ %7 = %6[0] : bf16[8, 32]
+ %8 = %6[1] : bf16[4]
+ %9 = %6[2] : i32[4]
+ %10 = %6[3] : i32[9]
+ %11 = mm(%7, %0) : bf16[8, 64]
+ %12 = sparse_mm(%8, %9, %10, %0, 32, False) : bf16[8, 64]
+ %13 = add(%11, %12) : bf16[8, 64]
+ %14 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %15 = mm(%14, %7) : bf16[64, 32] | bwd!
+ %16 = sparse_mm(%8, %9, %10, g, 32, True) : bf16[32, 64] | bwd!
+ %17 = permute(%16, [1, 0]) : bf16[64, 32] | bwd!
+ %18 = add(%15, %17) : bf16[64, 32] | bwd!
+ %2 = permute(%18, [1, 0]) : bf16[32, 64] | bwd
- return [%3, %1, None]
+ return [%13, %1, None]""")


def test_outliers_does_nothing_where_the_recipe_keeps_none():
    assert not around("outliers", linear(), matrix(8, 32), policy="fp8").text
