"""``rotate`` and ``rotate_grouped``: every planned product as A * B^T in the rotated basis."""

import torch
import torch.nn.functional as F
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn

import quartet

ENDS = torch.tensor([4, 4, 10, 16], dtype=torch.int32)


class Experts(nn.Module):
    def __init__(self, grad):
        super().__init__()
        self.experts = nn.Parameter(matrix(4, 32, 64, grad=False), requires_grad=grad)

    def forward(self, x, ends):
        return F.grouped_mm(x, self.experts, offs=ends)


def grouped(recipe, trained, grad):
    return around("rotate_grouped", Experts(trained), matrix(16, 32, grad=grad), ENDS,
                  policy=quartet.Policy(None).on("grouped", recipe))


def test_both_operands_are_rotated_along_what_is_contracted():
    with torch.no_grad():
        assert_expected_inline(around("rotate", linear(), matrix(8, 32)).text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = mm(x, %0) : bf16[8, 64] | ?
- return [%1]
+ %3 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
+ %4 = hadamard(x, 32, %3, False, f32) : f32[8, 32]
+ %5 = permute(%0, [1, 0]) : bf16[64, 32]
+ %6 = hadamard(%5, 32, %3, False, f32) : f32[64, 32]
+ %7 = permute(%6, [1, 0]) : f32[32, 64]
+ %8 = mm(%4, %7) : f32[8, 64]
+ %9 = convert_element_type(%8, bf16) : bf16[8, 64]
+ return [%9]""")


def test_backward_starts_from_what_forward_rotated_and_returns_to_the_models_basis():
    assert_expected_inline(around("rotate", linear(trained=False), matrix(8, 32)).text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
+ %6 = seed(cpu, False) : i64[1] | must_save
- %1 = mm(x, %0) : bf16[8, 64]
- %2 = permute(%0, [1, 0]) : bf16[64, 32] | bwd
+ %7 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
+ %8 = hadamard(x, 32, %7, False, f32) : f32[8, 32]
+ %9 = permute(%0, [1, 0]) : bf16[64, 32]
+ %10 = hadamard(%9, 32, %7, False, f32) : f32[64, 32]
+ %11 = permute(%10, [1, 0]) : f32[32, 64]
+ %12 = mm(%8, %11) : f32[8, 64]
+ %13 = convert_element_type(%12, bf16) : bf16[8, 64]
- %4 = mm(g, %2) : bf16[8, 32] | bwd
- return [%1, None, %4]
+ %14 = signs(%6, 0, 32) : f32[32] | bwd!
+ %15 = hadamard(g, 32, %14, False, f32) : f32[8, 64] | bwd!
+ %16 = permute(%10, [1, 0]) : f32[32, 64] | bwd!
+ %17 = hadamard(%16, 32, %14, False, f32) : f32[32, 64] | bwd!
+ %18 = permute(%17, [1, 0]) : f32[64, 32] | bwd!
+ %19 = mm(%15, %18) : f32[8, 32] | bwd!
+ %20 = convert_element_type(%19, bf16) : bf16[8, 32] | bwd!
+ %21 = hadamard(%20, 32, %7, True, bf16) : bf16[8, 32] | bwd!
+ return [%13, None, %21]""")


def test_the_gradient_is_rotated_along_its_rows_where_the_recipe_says_so():
    change = around("rotate", linear(trained=False), matrix(8, 32), policy="halo-fp8-2")
    assert_expected_inline(change.text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
- %1 = mm(x, %0) : bf16[8, 64]
- %2 = permute(%0, [1, 0]) : bf16[64, 32] | bwd
+ %6 = hadamard(x, 32, None, False, f32) : f32[8, 32]
+ %7 = permute(%0, [1, 0]) : bf16[64, 32]
+ %8 = hadamard(%7, 32, None, False, f32) : f32[64, 32]
+ %9 = permute(%8, [1, 0]) : f32[32, 64]
+ %10 = mm(%6, %9) : f32[8, 64]
+ %11 = convert_element_type(%10, bf16) : bf16[8, 64]
- %4 = mm(g, %2) : bf16[8, 32] | bwd
- return [%1, None, %4]
+ %12 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %13 = hadamard(%12, 32, None, False, bf16) : bf16[64, 32] | bwd!
+ %14 = permute(%13, [1, 0]) : bf16[32, 64] | bwd!
+ %15 = permute(%8, [1, 0]) : f32[32, 64] | bwd!
+ %16 = convert_element_type(%14, f32) : f32[32, 64] | bwd!
+ %17 = permute(%15, [1, 0]) : f32[64, 32] | bwd!
+ %18 = mm(%16, %17) : f32[32, 32] | bwd!
+ %19 = convert_element_type(%18, bf16) : bf16[32, 32] | bwd!
+ %20 = permute(%19, [1, 0]) : bf16[32, 32] | bwd!
+ %21 = hadamard(%20, 32, None, True, bf16) : bf16[32, 32] | bwd!
+ %22 = slice(%21, 1, 0, 8) : bf16[32, 8] | bwd!
+ %23 = permute(%22, [1, 0]) : bf16[8, 32] | bwd!
+ %24 = hadamard(%23, 32, None, True, bf16) : bf16[8, 32] | bwd!
+ return [%11, None, %24]""")


def test_the_bias_is_added_to_the_product():
    with torch.no_grad():
        assert_expected_inline(around("rotate", linear(bias=True), matrix(8, 32), policy="fp8").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = addmm(bias, x, %0) : bf16[8, 64] | ?
- return [%1]
+ %3 = permute(%0, [1, 0]) : bf16[64, 32]
+ %4 = permute(%3, [1, 0]) : bf16[32, 64]
+ %5 = mm(x, %4) : bf16[8, 64]
+ %6 = add(%5, bias) : bf16[8, 64]
+ return [%6]""")


def test_groups_start_afresh():
    assert_expected_inline(grouped("mxfp8", trained=False, grad=False).text, """\
- %0 = _grouped_mm(x, experts, x1) : bf16[16, 64] | ?
- return [%0]
+ %2 = group_layout(x1, 1, 16) : (i32[4], i32[16], i32[16])
+ %3 = %2[0] : i32[4]
+ %4 = %2[1] : i32[16]
+ %5 = %2[2] : i32[16]
+ %6 = pad_groups(x, %4) : bf16[16, 32] | prefer_recompute
+ %7 = permute(experts, [0, 2, 1]) : bf16[4, 64, 32]
+ %8 = reshape(%7, [-1, 32]) : bf16[256, 32]
+ %9 = grouped_mm(%6, %8, %3, False) : bf16[16, 64]
+ %10 = gather_rows(%9, %5) : bf16[16, 64]
+ return [%10]""")


def test_gradients_of_groups():
    assert_expected_inline(grouped("fp8", trained=True, grad=False).text, """\
- %0 = _grouped_mm(x, experts, x1) : bf16[16, 64]
- %1 = permute(x, [1, 0]) : bf16[32, 16] | bwd
- %2 = _grouped_mm(%1, g, x1) : bf16[4, 32, 64] | bwd
- return [%0, %2, None, None]
+ %4 = group_layout(x1, 16, 16) : (i32[4], i32[64], i32[16])
+ %5 = %4[0] : i32[4]
+ %6 = %4[1] : i32[64]
+ %7 = %4[2] : i32[16]
+ %8 = pad_groups(x, %6) : bf16[64, 32] | prefer_recompute
+ %9 = permute(experts, [0, 2, 1]) : bf16[4, 64, 32]
+ %10 = reshape(%9, [-1, 32]) : bf16[256, 32]
+ %11 = grouped_mm(%8, %10, %5, False) : bf16[64, 64]
+ %12 = gather_rows(%11, %7) : bf16[16, 64]
+ %13 = pad_groups(g, %6) : bf16[64, 64] | bwd!
+ %14 = permute(%8, [1, 0]) : bf16[32, 64] | bwd!
+ %15 = permute(%13, [1, 0]) : bf16[64, 64] | bwd!
+ %16 = grouped_mm(%15, %14, %5, True) : bf16[256, 32] | bwd!
+ %17 = reshape(%16, [4, -1, 32]) : bf16[4, 64, 32] | bwd!
+ %18 = permute(%17, [0, 2, 1]) : bf16[4, 32, 64] | bwd!
+ %19 = clone(%18, memory_format=torch.contiguous_format) : bf16[4, 32, 64] | bwd!
+ return [%12, %19, None, None]""")


def test_each_leaves_the_others_products():
    assert not around("rotate_grouped", linear(), matrix(8, 32)).text
    assert not around("rotate", Experts(True), matrix(16, 32), ENDS,
                      policy=quartet.Policy(None).on("grouped", "mxfp8")).text


def test_nothing_to_what_is_not_planned():
    policy = quartet.Policy(None).on("1", "mxfp8")
    change = around("rotate", nn.Sequential(linear(), linear(64, 32)), matrix(8, 32), policy=policy)
    assert "0.weight" not in change.text and "1.weight" in str(change.before)
