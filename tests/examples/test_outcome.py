"""What the end of a training run says of a gap: of one run, and of several that round differently."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.mark.parametrize("losses, said", [
    ([2.5, 2.0], "gap +0.5000"), ([2.5], ""),
    ([2.5, 2.0, 2.75, 2.25], "gap +0.5000, 3 roundings from +0.2500 to +0.7500"),
])
def test_a_gap_is_shown_with_its_spread(losses, said):
    outcome = importlib.import_module("outcome")
    names = ("quartet", "inductor", "quartet #2", "quartet #3")
    runs = [SimpleNamespace(name=name, validation=loss) for name, loss in zip(names, losses, strict=False)]
    assert outcome.gap_spread(runs) == said
