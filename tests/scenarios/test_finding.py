"""Which matmuls are found and lowered, whatever form a model writes them in; and that gradients stay good."""

import pytest
from harness import assert_close, assert_same, compile_eager, compile_plain, step
from models import CASES


@pytest.mark.parametrize("name", CASES)
def test_lowers_the_expected_matmuls(name):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    compiled, backend = compile_eager(model)
    got = step(compiled, model, inputs)
    assert backend.lowered() == case.lowered
    assert backend.alone() == case.alone
    assert_close(got, step(model, model, inputs))


@pytest.mark.parametrize("name", CASES)
def test_policy_bf16_is_torch_compile_bit_for_bit(name):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    compiled, backend = compile_eager(model, "bf16")
    got = step(compiled, model, inputs)
    assert not backend.lowered() and backend.records
    assert_same(got, step(compile_plain(model), model, inputs))
