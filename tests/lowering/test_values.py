"""Fake results of equal calls are worked out once, and are what the calls would give."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet.lowering import ir
from quartet.lowering.ir import values
from quartet.lowering.ir.values import value_of

FP4, FP8 = "e2m1/32 e8m0 even nearest", "e4m3/tensor fp32 amax nearest"


@pytest.fixture
def mode():
    return FakeTensorMode()


@pytest.fixture
def remembered(monkeypatch):
    """How many calls were answered from earlier ones."""
    made, found = values.undescribed, []
    monkeypatch.setattr(values, "undescribed", lambda layouts, tensor: found.append(layouts) or made(layouts, tensor))
    return found


def matrix(mode, *shape, dtype=torch.bfloat16):
    with mode:
        return torch.empty(shape, dtype=dtype)


def layouts(result):
    if isinstance(result, torch.Tensor):
        return type(result), tuple(result.shape), result.stride(), result.dtype, result.device
    return [layouts(each) for each in result]


@pytest.mark.parametrize(("op", "arguments"), [
    (ir.QUANTIZE, (FP4, None, 0)), (ir.QUANTIZE, (FP8, None, 3)), (ir.HADAMARD, (32, None, False, torch.float32)),
])
def test_results_are_those_of_the_call_and_tensors_of_their_own(mode, remembered, op, arguments):
    x, other = matrix(mode, 40, 64), matrix(mode, 40, 64)
    with mode:
        expected = layouts(op(x, *arguments))
    first, second = value_of(mode, op, (x, *arguments), {}), value_of(mode, op, (other, *arguments), {})
    assert remembered and layouts(first) == layouts(second) == expected
    pair = [each if isinstance(each, torch.Tensor) else each[0] for each in (first, second)]
    assert pair[0].untyped_storage()._cdata != pair[1].untyped_storage()._cdata


@pytest.mark.parametrize("other", [
    {"n": 64}, {"dtype": torch.bfloat16}, {"shape": (40, 128)}, {"x": torch.float32}], ids=str)
def test_what_makes_a_difference_is_asked_for(mode, remembered, other):
    def call(shape=(40, 64), n=32, x=torch.bfloat16, dtype=torch.float32):
        arguments = matrix(mode, *shape, dtype=x), n, None, False, dtype
        with mode:
            expected = layouts(ir.HADAMARD(*arguments))
        assert layouts(value_of(mode, ir.HADAMARD, arguments, {})) == expected

    call()
    call(**other)
    assert not remembered


def test_views_show_their_source(mode, remembered):
    x = matrix(mode, 40, 64)
    for _ in range(2):
        shown = value_of(mode, torch.ops.aten.permute.default, (x, [1, 0]), {})
        assert shown.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert not remembered


def test_nothing_is_remembered_of_another_mode(mode, remembered):
    for each in (mode, FakeTensorMode()):
        result = value_of(each, ir.HADAMARD, (matrix(each, 8, 32), 32, None, False, torch.float32), {})
        assert result.fake_mode is each
    assert not remembered
