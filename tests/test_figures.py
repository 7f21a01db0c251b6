"""README's figures are those of docs/figures.json, and its first program runs."""

import importlib
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_the_readme_are_those_of_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    figures = importlib.import_module("figures")
    blocks = figures.tables(json.loads(figures.FIGURES.read_text(encoding="utf-8")))
    assert figures.written(README, blocks) == README, "run `make figures`"


def test_the_first_program_of_the_readme_runs(monkeypatch, capsys):
    """Compiled by nothing, which is what other tests do; the table is the real one."""
    program = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: None)
    known = {}
    exec(program.replace("range(20)", "range(2)"), known)
    assert "model.layers.{0..3}.mlp.down_proj" in capsys.readouterr().out
    assert known["loss"].isfinite() and "quartet" in sys.modules
