"""The optimizer benchmark runs on a CPU at a small size and records what its table shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/bench_optim.py"
SIZE = ("--device", "cpu", "--layers", "1", "--width", "256", "--vocabulary", "300", "--repeat", "2")


def bench(*arguments):
    return subprocess.run([sys.executable, str(PROGRAM), *SIZE, *arguments], capture_output=True, text=True)


def test_it_measures_and_continues(tmp_path):
    out = tmp_path / "bench.json"
    columns = "torch fused,bitsandbytes 8bit,quartet e4m3 e5m2,quartet e4m3/256 SR"
    done = bench("--out", str(out), "--columns", columns)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"].values()
    found = result["columns"]
    assert found["quartet e4m3 e5m2"]["state_ratio"] == pytest.approx(0.25, abs=0.003)
    assert found["quartet e4m3/256 SR"]["state_ratio"] == pytest.approx(0.254, abs=0.003)
    assert found["torch fused"]["state_ratio"] == pytest.approx(0.5, abs=0.001)
    assert found["copy"]["share"] == 1.0 and found["torch fused"]["over_torch"] == 1.0
    assert "states GB" in done.stdout and "quartet e4m3/256 SR" in done.stdout
    again = bench("--out", str(out), "--columns", columns)
    assert again.returncode == 0 and "first step" not in again.stdout


def test_an_unknown_column_is_named(tmp_path):
    done = bench("--columns", "adafactor", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2 and "no column 'adafactor'" in done.stderr
