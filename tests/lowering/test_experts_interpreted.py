"""Experts in MXFP4 through the Triton kernels and exact folds, expert by expert, in Triton's interpreter."""

from pathlib import Path

import pytest
from interpreter import interpret

pytest.importorskip("triton")


def test_every_expert_has_the_gradient_of_the_reference():
    """Also one whose gradients are far below the others': its part of a row is folded with a scale of its own."""
    lines = interpret(Path(__file__).with_name("expert_cases.py"))
    assert lines
    for name, line in lines.items():
        assert max(line["errors"]) < 6e-3, f"{name}: {line['errors']}"  # a bf16 output's rounding, both ways
        assert [error == 0 for error in line["errors"]] == line["empty"], name
