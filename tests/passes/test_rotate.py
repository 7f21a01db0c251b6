"""``rotate``: every planned product as A * B^T in the rotated basis."""

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
    return around("rotate", Experts(trained), matrix(16, 32, grad=grad), ENDS,
                  policy=quartet.Policy(None).on("grouped", recipe))


def test_both_operands_are_rotated_along_what_is_contracted():
    with torch.no_grad():
        assert_expected_inline(around("rotate", linear(), matrix(8, 32)).text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = mm(x, %0) : bf16[8, 64] | ?
- return [%1]
+ %2 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
+ %3 = hadamard(x, 32, %2, False, f32) : f32[8, 32]
+ %4 = permute(%0, [1, 0]) : bf16[64, 32]
+ %5 = hadamard(%4, 32, %2, False, f32) : f32[64, 32]
+ %6 = permute(%5, [1, 0]) : f32[32, 64]
+ %7 = mm(%3, %6) : f32[8, 64]
+ %8 = convert_element_type(%7, bf16) : bf16[8, 64]
+ return [%8]""")


def test_backward_starts_from_what_forward_rotated_and_returns_to_the_models_basis():
    assert_expected_inline(around("rotate", linear(trained=False), matrix(8, 32)).text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
+ %1 = seed('cpu', False) : i64[1] | must_save
- %2 = mm(x, %0) : bf16[8, 64]
- %3 = permute(%0, [1, 0]) : bf16[64, 32] | bwd
+ %4 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
+ %5 = hadamard(x, 32, %4, False, f32) : f32[8, 32]
+ %6 = permute(%0, [1, 0]) : bf16[64, 32]
+ %7 = hadamard(%6, 32, %4, False, f32) : f32[64, 32]
+ %8 = permute(%7, [1, 0]) : f32[32, 64]
+ %9 = mm(%5, %8) : f32[8, 64]
+ %10 = convert_element_type(%9, bf16) : bf16[8, 64]
- %11 = mm(g, %3) : bf16[8, 32] | bwd
- return [%2, None, %11]
+ %12 = signs(%1, 0, 32) : f32[32] | bwd!
+ %13 = hadamard(g, 32, %12, False, f32) : f32[8, 64] | bwd!
+ %14 = permute(%7, [1, 0]) : f32[32, 64] | bwd!
+ %15 = hadamard(%14, 32, %12, False, f32) : f32[32, 64] | bwd!
+ %16 = permute(%15, [1, 0]) : f32[64, 32] | bwd!
+ %17 = mm(%13, %16) : f32[8, 32] | bwd!
+ %18 = convert_element_type(%17, bf16) : bf16[8, 32] | bwd!
+ %19 = hadamard(%18, 32, %4, True, bf16) : bf16[8, 32] | bwd!
+ return [%10, None, %19]""")


def test_the_gradient_is_rotated_along_its_rows_where_the_recipe_says_so():
    change = around("rotate", linear(trained=False), matrix(8, 32), policy="halo-fp8-2")
    assert_expected_inline(change.text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64]
- %1 = mm(x, %0) : bf16[8, 64]
- %2 = permute(%0, [1, 0]) : bf16[64, 32] | bwd
+ %3 = hadamard(x, 32, None, False, f32) : f32[8, 32]
+ %4 = permute(%0, [1, 0]) : bf16[64, 32]
+ %5 = hadamard(%4, 32, None, False, f32) : f32[64, 32]
+ %6 = permute(%5, [1, 0]) : f32[32, 64]
+ %7 = mm(%3, %6) : f32[8, 64]
+ %8 = convert_element_type(%7, bf16) : bf16[8, 64]
- %9 = mm(g, %2) : bf16[8, 32] | bwd
- return [%1, None, %9]
+ %10 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
+ %11 = hadamard(%10, 32, None, False, bf16) : bf16[64, 32] | bwd!
+ %12 = permute(%11, [1, 0]) : bf16[32, 64] | bwd!
+ %13 = permute(%5, [1, 0]) : f32[32, 64] | bwd!
+ %14 = convert_element_type(%12, f32) : f32[32, 64] | bwd!
+ %15 = permute(%13, [1, 0]) : f32[64, 32] | bwd!
+ %16 = mm(%14, %15) : f32[32, 32] | bwd!
+ %17 = convert_element_type(%16, bf16) : bf16[32, 32] | bwd!
+ %18 = permute(%17, [1, 0]) : bf16[32, 32] | bwd!
+ %19 = hadamard(%18, 32, None, True, bf16) : bf16[32, 32] | bwd!
+ %20 = slice(%19, 1, 0, 8) : bf16[32, 8] | bwd!
+ %21 = permute(%20, [1, 0]) : bf16[8, 32] | bwd!
+ %22 = hadamard(%21, 32, None, True, bf16) : bf16[8, 32] | bwd!
+ return [%8, None, %22]""")


def test_the_bias_is_added_to_the_product():
    with torch.no_grad():
        assert_expected_inline(around("rotate", linear(bias=True), matrix(8, 32), policy="fp8").text, """\
  %0 = permute(weight, [1, 0]) : bf16[32, 64] | ?
- %1 = addmm(bias, x, %0) : bf16[8, 64] | ?
- return [%1]
+ %2 = permute(%0, [1, 0]) : bf16[64, 32]
+ %3 = permute(%2, [1, 0]) : bf16[32, 64]
+ %4 = mm(x, %3) : bf16[8, 64]
+ %5 = add(%4, bias) : bf16[8, 64]
+ return [%5]""")


def test_groups_start_afresh():
    assert_expected_inline(grouped("mxfp8", trained=False, grad=False).text, """\
- %0 = _grouped_mm(x, experts, x1) : bf16[16, 64] | ?
- return [%0]
+ %1 = group_layout(x1, 1, 16) : (i32[4], i32[16], i32[16])
+ %2 = %1[0] : i32[4]
+ %3 = %1[1] : i32[16]
+ %4 = %1[2] : i32[16]
+ %5 = pad_groups(x, %3) : bf16[16, 32] | prefer_recompute
+ %6 = permute(experts, [0, 2, 1]) : bf16[4, 64, 32]
+ %7 = reshape(%6, [-1, 32]) : bf16[256, 32]
+ %8 = grouped_mm(%5, %7, %2, False) : bf16[16, 64]
+ %9 = gather_rows(%8, %4) : bf16[16, 64]
+ return [%9]""")


def test_gradients_of_groups():
    assert_expected_inline(grouped("fp8", trained=True, grad=False).text, """\
- %0 = _grouped_mm(x, experts, x1) : bf16[16, 64]
- %1 = permute(x, [1, 0]) : bf16[32, 16] | bwd
- %2 = _grouped_mm(%1, g, x1) : bf16[4, 32, 64] | bwd
- return [%0, %2, None, None]
+ %3 = group_layout(x1, 16, 16) : (i32[4], i32[64], i32[16])
+ %4 = %3[0] : i32[4]
+ %5 = %3[1] : i32[64]
+ %6 = %3[2] : i32[16]
+ %7 = pad_groups(x, %5) : bf16[64, 32] | prefer_recompute
+ %8 = permute(experts, [0, 2, 1]) : bf16[4, 64, 32]
+ %9 = reshape(%8, [-1, 32]) : bf16[256, 32]
+ %10 = grouped_mm(%7, %9, %4, False) : bf16[64, 64]
+ %11 = gather_rows(%10, %6) : bf16[16, 64]
+ %12 = pad_groups(g, %5) : bf16[64, 64] | bwd!
+ %13 = permute(%7, [1, 0]) : bf16[32, 64] | bwd!
+ %14 = permute(%12, [1, 0]) : bf16[64, 64] | bwd!
+ %15 = grouped_mm(%14, %13, %4, True) : bf16[256, 32] | bwd!
+ %16 = reshape(%15, [4, -1, 32]) : bf16[4, 64, 32] | bwd!
+ %17 = permute(%16, [0, 2, 1]) : bf16[4, 32, 64] | bwd!
+ %18 = clone(%17, memory_format=torch.contiguous_format) : bf16[4, 32, 64] | bwd!
+ return [%11, %18, None, None]""")


def test_nothing_to_what_is_not_planned():
    policy = quartet.Policy(None).on("1", "mxfp8")
    change = around("rotate", nn.Sequential(linear(), linear(64, 32)), matrix(8, 32), policy=policy)
    assert "0.weight" not in change.text and "1.weight" in str(change.before)
