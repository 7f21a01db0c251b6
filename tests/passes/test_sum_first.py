"""``sum_first``: gradients of one X are added up before the mask and the inverse transform that they share."""

import pytest
import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn
from uncompiled import uncompiled

import quartet


class Three(nn.Module):
    """Layers that read the same X, as q, k and v do."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(), linear(), linear()

    def forward(self, x):
        return self.q(x) + self.k(x) * self.v(x)


def everywhere(recipe):
    return quartet.Policy(recipe).on("*", recipe)


def backward(lines, op):
    """Calls in backward that the model has not."""
    return sum(f"= {op}(" in line and "bwd!" in line for line in lines)


def inverses(lines):
    """Inverse transforms in backward."""
    return sum("hadamard(" in line and ", True, " in line and "bwd" in line for line in lines)


@pytest.mark.parametrize("recipe", ["quartet", "quartet-paper"])
def test_one_inverse_transform_for_three_layers_that_read_one_x(recipe):
    change = around("sum_first", Three(), matrix(64, 32), policy=everywhere(recipe))
    assert (inverses(change.before), inverses(change.after)) == (6, 4)  # of three weights and of X


def test_the_additions_come_before_mask_and_transform():
    model = Three()
    for layer in model.children():
        layer.weight.requires_grad_(False)
    assert_expected_inline(around("sum_first", model, matrix(64, 32), policy=everywhere("quartet-paper")).text, """\
  %0 = %1[2] : u8[64, 4]
  %2 = add(%3, %4) : bf16[64, 64]
  %5 = scaled_mm(%6, %7, %8, %9, 'e2m1/32 e8m0 headroom stochastic', 'e2m1/32 e8m0 headroom stochastic', bf16) : bf16[64, 32] | bwd!
  %10 = scaled_mm(%11, %12, %13, %14, 'e2m1/32 e8m0 headroom stochastic', 'e2m1/32 e8m0 headroom stochastic', bf16) : bf16[64, 32] | bwd!
  %15 = scaled_mm(%16, %17, %18, %19, 'e2m1/32 e8m0 headroom stochastic', 'e2m1/32 e8m0 headroom stochastic', bf16) : bf16[64, 32] | bwd!
- %20 = apply_mask(%5, %0) : bf16[64, 32] | bwd!
- %21 = hadamard(%20, 32, None, True, bf16) : bf16[64, 32] | bwd!
- %22 = apply_mask(%10, %0) : bf16[64, 32] | bwd!
- %23 = hadamard(%22, 32, None, True, bf16) : bf16[64, 32] | bwd!
- %24 = add(%21, %23) : bf16[64, 32] | bwd
+ %25 = add(%5, %10) : bf16[64, 32] | bwd!
- %26 = apply_mask(%15, %0) : bf16[64, 32] | bwd!
- %27 = hadamard(%26, 32, None, True, bf16) : bf16[64, 32] | bwd!
- %28 = add(%24, %27) : bf16[64, 32] | bwd
- return [%2, None, %28, None, None]
+ %29 = add(%25, %15) : bf16[64, 32] | bwd!
+ %30 = apply_mask(%29, %0) : bf16[64, 32] | bwd!
+ %31 = hadamard(%30, 32, None, True, bf16) : bf16[64, 32] | bwd!
+ return [%2, None, %31, None, None]""")


class Experts(nn.Module):
    """gate and up of experts, of the same tokens."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(3, 32, 48).bfloat16()) for _ in range(2))

    def forward(self, x, ends):
        return torch.nn.functional.grouped_mm(x, self.gate, offs=ends) * torch.nn.functional.grouped_mm(x, self.up,
                                                                                                         offs=ends)


def test_gradients_of_tokens_are_added_up_in_the_padded_layout():
    ends = torch.tensor([16, 16, 60], dtype=torch.int32)
    change = around("sum_first", Experts(), matrix(64, 32), ends, policy=quartet.Policy(None).on("grouped", "quartet"))
    assert (inverses(change.before), inverses(change.after)) == (4, 3)  # of two weights and of X
    assert (backward(change.before, "gather_rows"), backward(change.after, "gather_rows")) == (2, 1)


@pytest.mark.parametrize(("recipe", "gain"), [("quartet", 16 / 9), ("quartet-paper", 16 / 9), ("tetrajet", None)])
@pytest.mark.parametrize("target", ["cpu", "sm_90", "sm_100"])
def test_a_kernel_undoes_the_rotation_of_the_sum(recipe, gain, target):
    change = around("lower", Three(), matrix(64, 32), policy=everywhere(recipe), target=target)
    kernels = [line for line in change.after if "= unrotate(" in line]
    assert not inverses(change.after)
    assert len(kernels) == (4 if gain else 0)
    if gain and target != "sm_100":  # there the product applies it
        assert all(str(gain) in line for line in kernels) and backward(change.after, "mul") == 0


def test_nothing_where_two_layers_have_masks_of_their_own():
    policy = everywhere("quartet-paper").on("k", "quartet").on("v", "fp8")
    change = around("sum_first", Three(), matrix(64, 32), policy=policy)
    assert inverses(change.before) == inverses(change.after) and not change.text


def test_nothing_without_a_transform():
    assert not around("sum_first", Three(), matrix(64, 32), policy=everywhere("fp8")).text


def test_nothing_where_something_else_reads_an_addend():
    class Twice(Three):
        def forward(self, x):
            left, right = x * 1, x * 1
            return self.q(left) + self.k(right) * self.v(right)

    change = around("sum_first", Twice(), matrix(64, 32), policy=everywhere("quartet-paper"))
    assert inverses(change.before) - inverses(change.after) == 1  # of k and v, which read one X; q has its own


@pytest.mark.parametrize("recipe", ["quartet", "quartet-paper"])
def test_gradients_are_those_of_transforms_one_by_one_but_for_rounding(recipe):
    gradients = []
    for disabled in ((), ("sum_first",)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Three().float(), torch.randn(64, 32, requires_grad=True)
        step = torch.compile(model, backend=uncompiled, options={"policy": everywhere(recipe),
                                                                  "disable_passes": disabled})
        step(x).square().sum().backward()
        gradients.append(x.grad.double())
    summed, apart = gradients
    assert 0 < (summed - apart).norm() / apart.norm() < 2**-22
