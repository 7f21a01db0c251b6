"""benchmarks/recipe_table.py in miniature: a row a recipe, sorted, a failure among them, continued from its file."""

import importlib
import json
from pathlib import Path

import pytest

from quartet import recipes

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--interpret", "--device", "cpu", "--size", "tiny", "--steps", "2", "--batch", "2", "--seq", "32",
        "--draws", "2", "--train-bytes", "4096", "--validation-bytes", "200")


@pytest.fixture
def script(monkeypatch):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module("recipe_table")


def test_rows(script, tmp_path, capsys):
    out = tmp_path / "table.json"
    command = [*TINY, "--out", str(out), "--recipes", "bf16,mxfp8,quartet,no-such"]
    script.main(command)
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert "unknown policy" in results["no-such"]["failed"]
    assert results["bf16"]["cosine"] > results["mxfp8"]["cosine"] > results["quartet"]["cosine"] > 0.5
    assert results["quartet"]["mean_cosine"] > results["quartet"]["cosine"]
    printed = capsys.readouterr().out
    assert "2505.14669" in printed and "failed" in printed
    script.main([*command, "--time-limit", "0"])
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == results


def test_it_covers_the_catalogue(script):
    assert script.quantising() == ["bf16", *(name for name, recipe in recipes().items() if recipe.quantizes)]
    assert set(script.PUBLISHED) == set(script.quantising())
    assert all((place is None) == said.startswith("no ") for place, said in script.PUBLISHED.values())
