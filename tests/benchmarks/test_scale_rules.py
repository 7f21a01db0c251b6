"""``scale_rules.py``: its own rules are what they say, and the tables have a row a rule."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scale_rules")


def test_the_least_of_two_has_the_least_error_of_rules_between_them(script):
    for name, x in script.distributions(128, 64, torch.Generator().manual_seed(0)):
        errors = {rule: script.of_blocks(x * script.octave(128), script.RULES[rule])[0]
                  for rule in ("ceil", "even", "amax/7.5", "least of two")}
        assert min(errors, key=errors.get) == "least of two" and errors["even"] < errors["ceil"], name


def test_seven_is_where_even_steps(script):
    blocks = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(script.below(7.0)(blocks), script.RULES["even"](blocks))
    assert torch.equal(script.below(6.0)(blocks), script.RULES["ceil"](blocks))


def test_tables_have_a_row_a_rule(script, capsys):
    script.main(["--rows", "32", "--seeds", "1"])
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name}  ") == 1 + (name in script.SPECS) for name in script.RULES)
    assert out.count(f"\n{script.SIGNED} ") == 2
    assert "nan" not in out
