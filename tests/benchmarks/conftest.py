"""What tests that compile ask for: ``pytestmark = pytest.mark.usefixtures("fresh_dynamo")``."""

import pytest
import torch


@pytest.fixture
def fresh_dynamo():
    """Nothing of what an earlier test compiled, and nothing left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
