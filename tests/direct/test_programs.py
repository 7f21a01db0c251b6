"""The example and the benchmark run to their end."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def programs(monkeypatch):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield
    for name in ("direct", "direct_ternary"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"the cat sat on the mat, and the dog sat on the log. " * 400)
    return file


def test_the_example_trains_generates_and_exports(programs, text, tmp_path, capsys):
    import direct_ternary

    out = tmp_path / "model.pt"
    losses = direct_ternary.main(["--steps", "25", "--batch", "4", "--seq", "32", "--length", "8", "--text", str(text),
                                  "--out", str(out), "--device", "cpu", "--lr", "1e-2"])
    assert losses[-1] < 0.8 * losses[0] and out.exists()
    printed = capsys.readouterr().out
    assert "generates the same text" in printed
    assert float(re.search(r"validation loss ([\d.]+) nats a byte", printed)[1]) < losses[0]


def test_the_benchmark_writes_a_row_a_column(programs, tmp_path, capsys):
    import direct as benchmark

    out = tmp_path / "direct.json"
    columns = ["fp32", "bitnet", "ternary", "8>ternary", "paper-4", "8+feedback", "7"]
    benchmark.main(["--columns", ",".join(columns), "--steps", "2", "--batch", "2", "--seq", "16", "--device", "cpu",
                    "--train-bytes", "20000", "--validation-bytes", "200", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["best"]) == set(columns) - {"7"}
    assert "there is no column '7'" in found["results"]["7/0.003/0"]["failed"]
    assert found["results"]["8>ternary/0.003/0"]["as_ternary"] > 0
    best = found["best"]
    assert best["ternary"]["weight_bytes"] < 0.32 and best["fp32"]["weight_bytes"] == 4
    assert best["8+feedback"]["state_bytes"] == best["ternary"]["state_bytes"] + 1 == 9
    assert "failed or not run" in capsys.readouterr().out
