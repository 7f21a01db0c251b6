"""``smooth_swiglu``: the range of a gated activation's linear branch, taken out of X."""

from dataclasses import replace

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


def test_by_channels_the_weight_takes_it():
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


def test_by_tokens_the_result_takes_it():
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


def test_nothing_where_x_is_no_gated_activation():
    class Ungated(Gated):
        def forward(self, a, b):
            return self.down(F.silu(a) + b)

    assert not smoothed(CHANNEL, Ungated())


def test_nothing_where_the_recipe_asks_for_none():
    assert not smoothed(quartet.recipes()["fp8-delayed"])
