"""The graph of a small model before and after one pass, compared with what the test says (``expecttest``).

A pass that changes what it writes: look at the difference, then let ``EXPECTTEST_ACCEPT=1`` write it into the tests.
"""

import logging

import pytest
import torch

logging.getLogger("torch.__trace").propagate = False  # pytest would format and keep every line


@pytest.fixture(autouse=True)
def the_same_numbers():
    torch.manual_seed(0)
