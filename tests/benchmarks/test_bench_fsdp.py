"""The benchmark of FSDP2 runs without a GPU, on two gloo processes, and says what it sends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gloo

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_fsdp.py"


def run(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run([*command, *arguments, "--model", "tiny", "--eager", "--device", "cpu", "--out",
                           str(folder / "out.json")], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads((folder / "out.json").read_text())["results"]


@gloo.available
def test_columns(tmp_path):
    shown, results = run(tmp_path, "--columns", "bf16,fp8+packed", "--steps", "1", "--warm-up", "0")
    columns = results["tiny"]
    for way in ("reshard", "keep"):
        sent, whole = (columns[name][way]["bytes"] for name in ("fp8+packed", "bf16"))
        assert 0 < sent["all_gather uint8"] < 0.54 * (whole["all_gather bfloat16"] - sent["all_gather bfloat16"])
        assert sent["reduce_scatter bfloat16"] == whole["reduce_scatter bfloat16"]
    assert "fp8+packed" in shown and "14 of 21 parameters" in shown
