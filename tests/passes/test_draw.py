"""``draw``: the random signs of all rotations of a direction are drawn at once."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn
from uncompiled import uncompiled

import quartet

PAPER = quartet.Policy("quartet").on("*", "quartet")


def chain(layers, trained=True):
    return nn.Sequential(*(linear(32, 32, trained=trained) for _ in range(layers)))


def test_the_signs_of_backward_are_rows_of_one_table():
    assert_expected_inline(around("draw", chain(2, trained=False), matrix(8, 32), policy=PAPER).text, """\
  %0 = seed('cpu', False) : i64[1] | must_save
  %1 = permute(%2, [1, 0]) : f32[32, 32] | bwd!
  %3 = hadamard(%4, 32, %5, True, bf16) : bf16[8, 32] | bwd!
  %6 = permute(%7, [1, 0]) : f32[32, 32] | bwd!
- %8 = signs(%0, 16, 32) : f32[32] | bwd!
- %9 = hadamard(g, 32, %8, False, f32) : f32[8, 32] | bwd!
+ %10 = sign_table(%0, 0, 17, 32) : f32[17, 32] | bwd!
+ %11 = select(%10, 0, 16) : f32[32] | bwd!
+ %12 = select(%10, 0, 0) : f32[32] | bwd!
+ %9 = hadamard(g, 32, %11, False, f32) : f32[8, 32] | bwd!
- %13 = hadamard(%1, 32, %8, False, f32) : f32[32, 32] | bwd!
+ %13 = hadamard(%1, 32, %11, False, f32) : f32[32, 32] | bwd!
- %14 = signs(%0, 0, 32) : f32[32] | bwd!
- %15 = hadamard(%3, 32, %14, False, f32) : f32[8, 32] | bwd!
+ %15 = hadamard(%3, 32, %12, False, f32) : f32[8, 32] | bwd!
- %16 = hadamard(%6, 32, %14, False, f32) : f32[32, 32] | bwd!
+ %16 = hadamard(%6, 32, %12, False, f32) : f32[32, 32] | bwd!""")


def test_nothing_where_there_is_one_rotation():
    assert not around("draw", chain(1, trained=False), matrix(8, 32), policy=PAPER).text


def test_nothing_where_signs_are_fixed_or_none():
    assert not around("draw", chain(2), matrix(8, 32), policy=quartet.Policy("tetrajet").on("*", "tetrajet")).text
    with torch.no_grad():
        assert not around("draw", chain(2), matrix(8, 32), policy=PAPER).text


def test_no_number_changes():
    gradients = []
    for disabled in ((), ("draw",)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = chain(3), matrix(64, 32)
        step = torch.compile(model, backend=uncompiled, options={"policy": PAPER, "disable_passes": disabled})
        step(x).float().square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *gradients))
