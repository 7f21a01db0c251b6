"""Signs drawn in Python integers are the reference's."""

import pytest
import torch

from quartet.kernels.reference.philox import random_signs, random_signs_of_int
from quartet.lowering import ir


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**62 - 1, -1, -(2**63)])
@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_integer_signs_equal_the_reference(seed: int, n: int) -> None:
    expected = random_signs(torch.tensor(seed), 7, n)
    assert torch.equal(random_signs_of_int(seed, 7, n), expected)
    assert torch.equal(ir.SIGNS(torch.tensor([seed]), 7, n), expected)
    assert set(expected.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_fixed_signs_are_those_given(n: int) -> None:
    signs = random_signs(torch.tensor(11), 3, n).to(torch.int64).tolist()
    got = ir.FIXED_SIGNS(signs, torch.device("cpu"))
    assert got.dtype == torch.float32 and got.tolist() == signs
