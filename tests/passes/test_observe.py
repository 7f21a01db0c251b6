"""``observe`` and ``check``: ops beside the products that read what is there anyway."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline

from quartet.inspect import Inspector


def test_operands_are_read_before_they_are_rotated():
    change = around("observe", linear(), matrix(8, 32), policy="quartet", inspect=Inspector())
    assert_expected_inline(change.text.replace('"', "'"), """\
  %0 = seed('cpu', False) : i64[1] | must_save
  %1 = permute(weight, [1, 0]) : bf16[32, 64]
  %2 = fixed_signs([-1, 1, 1, -1, 1, 1, 1, 1, ... 32], cpu) : f32[32]
  %3 = permute(%1, [1, 0]) : bf16[64, 32]
  %4 = %5[0] : u8[8, 16]
  %6 = %5[1] : u8[8, 1]
  %7 = %8[0] : u8[64, 16]
  %9 = %8[1] : u8[64, 1]
  %10 = select(%11, 0, 3) : f32[32] | bwd!
  %12 = select(%11, 0, 0) : f32[32] | bwd!
  %13 = permute(g, [1, 0]) : bf16[64, 8] | bwd!
  %14 = hadamard(%15, 32, %2, True, bf16) : bf16[64, 32] | bwd!
  %16 = hadamard(%17, 32, %2, True, bf16) : bf16[8, 32] | bwd!
+ %18 = observe(token, [x, %1], '[['Keep',{'layer':'0','x':{'at':0},'w':{'at':1,'flipped':true}}]]') : None | !
+ %19 = observe(token, [x, %2, %3], '[['Operand',{'names':['weight fprop x'],'x':0,'spec':'e2m1/32 e8m0 even nearest','rotation':32,'signs':1}],['Operand',{'names':['weight fprop w'],'x':2,'spec':'e2m1/32 e8m0 even nearest','rotation':32,'signs':1}]]') : None | !
+ %20 = observe(token, [g, %12, %0, %9, %7], '[['Operand',{'names':['weight dgrad e'],'x':0,'spec':'e2m1/32 e8m0 headroom stochastic','rotation':32,'signs':1,'seed':2,'site':1}],['Operand',{'names':['weight dgrad w'],'x':4,'spec':'e2m1/32 e8m0 headroom stochastic','rotation':32,'signs':1,'seed':2,'site':2,'stored':{'scales':3,'spec':'e2m1/32 e8m0 even nearest','dtype':'float32','turned':true}}]]') : None | bwd!
+ %21 = observe(token, [%13, %10, %0, %6, %4], '[['Operand',{'names':['weight wgrad e'],'x':0,'spec':'e2m1/32 e8m0 headroom stochastic','rotation':32,'signs':1,'seed':2,'site':4}],['Operand',{'names':['weight wgrad x'],'x':4,'spec':'e2m1/32 e8m0 headroom stochastic','rotation':32,'signs':1,'seed':2,'site':5,'stored':{'scales':3,'spec':'e2m1/32 e8m0 even nearest','dtype':'float32','turned':true}}]]') : None | bwd!
+ %22 = observe(token, [g, %14], '[['Product',{'name':'weight wgrad','layer':'0','of_weight':true,'e':{'at':0},'out':{'at':1}}]]') : None | bwd!
+ %23 = observe(token, [g, %16], '[['Product',{'name':'weight dgrad','layer':'0','of_weight':false,'e':{'at':0},'out':{'at':1}}]]') : None | bwd!""")


def test_products_are_checked_behind_them():
    change = around("check", linear(), matrix(8, 32), policy="fp8", check="finite")
    assert_expected_inline(change.text, """\
  %0 = scaled_mm(%1, %2, %3, %4, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 64]
  %5 = scaled_mm(%6, %7, %8, %2, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[64, 32] | bwd!
  %9 = scaled_mm(%10, %7, %11, %4, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32] | bwd!
+ %12 = check_finite(token, [x, weight, %0], 'weight', 'fprop', 'X|W|its result') : None | !
+ %13 = check_finite(token, [g, %5], 'weight', 'wgrad', 'E|its result') : None | bwd!
+ %14 = check_finite(token, [g, %9], 'weight', 'dgrad', 'E|its result') : None | bwd!""")


def test_nothing_is_put_in_unless_it_is_asked_for():
    for name in ("observe", "check"):
        assert not around(name, linear(), matrix(8, 32)).text


def test_graphs_that_evaluate_have_no_statistics():
    with torch.no_grad():
        assert not around("observe", linear(), matrix(8, 32), inspect=Inspector()).text
        assert "check_finite" in around("check", linear(), matrix(8, 32), check="finite").text


def test_products_that_nothing_quantises():
    assert "observe" in around("observe", linear(), matrix(8, 32), policy="bf16", inspect=Inspector(
        what_if=["fp8"])).text
    assert "check_finite" in around("check", linear(), matrix(8, 32), policy="bf16", check="finite").text
