"""The benchmark of direct steps runs on a CPU at a small size and records what its table shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/bench_direct.py"
SIZE = ("--device", "cpu", "--layers", "1", "--width", "128", "--repeat", "1", "--bucket-mb", "1,2")


def bench(*arguments):
    return subprocess.run([sys.executable, str(PROGRAM), *SIZE, *arguments], capture_output=True, text=True)


def test_it_measures_and_continues(tmp_path):
    out = tmp_path / "bench.json"
    columns = "copy,torch fused,8,ternary,ternary reference"
    done = bench("--out", str(out), "--columns", columns)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"].values()
    found, count = result["columns"], result["parameters"]
    assert list(found) == ["copy", "torch fused", "8 1 MB", "8 2 MB", "ternary 1 MB", "ternary 2 MB",
                           "ternary reference"]
    assert found["torch fused"]["bytes"] / count == pytest.approx(14, abs=0.01)
    assert found["8 1 MB"]["bytes"] / count == pytest.approx(26 + 3 + 4, abs=0.2)
    assert found["ternary reference"]["bytes"] / count == pytest.approx(26 + 0.75 + 4, abs=0.2)
    assert found["copy"]["share"] == 1.0 and found["torch fused"]["over_torch"] == 1.0
    assert found["8 1 MB"]["flipped"] > 0
    assert "bytes a weight" in done.stdout
    again = bench("--out", str(out), "--columns", columns)
    assert again.returncode == 0 and "first step" not in again.stdout


def test_an_unknown_column_is_named(tmp_path):
    done = bench("--columns", "16", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2 and "no column '16'" in done.stderr
