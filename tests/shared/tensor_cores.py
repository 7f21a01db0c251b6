"""A device that counts as more than it is."""

from __future__ import annotations

import pytest

from quartet.runtime.devices import Target


def with_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as one with FP8 tensor cores: a CPU runs ``_scaled_mm`` too."""
    asked = Target.lacks
    monkeypatch.setattr(Target, "lacks", lambda self, name: None if name == "fp8 tensor cores" else asked(self, name))
