"""The benchmark of FSDP2 runs without a GPU, on two gloo processes, and says what it sends."""

import json
from pathlib import Path

import gloo
import torchrun

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_fsdp.py"


def run(folder, *arguments):
    out = folder / "out.json"
    shown = torchrun.run(SCRIPT, *arguments, "--model", "tiny", "--eager", "--device", "cpu", "--out", out)
    return shown, json.loads(out.read_text())["results"]


@gloo.available
def test_columns(tmp_path):
    shown, results = run(tmp_path, "--columns", "bf16,fp8+packed", "--steps", "1", "--warm-up", "0")
    columns = results["tiny"]
    for way in ("reshard", "keep"):
        sent, whole = (columns[name][way]["bytes"] for name in ("fp8+packed", "bf16"))
        assert 0 < sent["all_gather uint8"] < 0.54 * (whole["all_gather bfloat16"] - sent["all_gather bfloat16"])
        assert sent["reduce_scatter bfloat16"] == whole["reduce_scatter bfloat16"]
    assert "fp8+packed" in shown and "14 of 21 parameters" in shown
