"""The benchmark of saved activations, at a tiny size: its rows, its table, and that columns differ as they should."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import saved_activations as benchmark


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark.MODELS, "vit", lambda batch: (
            benchmark.ViT(64, 1, 2, size=64, classes=16),
            (benchmark.torch.randn(batch, 3, 64, 64).bfloat16(), benchmark.torch.arange(batch) % 16)))
        return benchmark.measure("vit", 16, "cpu", True)


def test_saved_activations_keep_less_than_quartet_and_quartet_less_than_bfloat16(rows):
    kept = {row["column"]: row["bytes"] for row in rows}
    assert list(kept) == list(benchmark.COLUMNS)
    assert kept["quartet + e4m3/16-attention"] < kept["quartet + e4m3/16"] < kept["quartet"] < kept["bf16"]
    assert kept["bf16 + e4m3/16"] < kept["bf16"] and kept["bf16 + Inductor's FP8 pass"] < kept["bf16"]


def test_gradients_stay_close_to_those_of_exact_activations(rows):
    found = {row["column"]: row["cosine"] for row in rows}
    assert found["bf16"] == pytest.approx(1) and found["bf16 + e4m3/16"] > 0.99
    assert all(value > 0.9 for value in found.values())


def test_the_table_has_a_line_for_every_column(rows):
    lines = benchmark.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "cosine" in lines[0] and "| 1.000 | 1.0000 |" in lines[2]
