"""Delayed scaling through real Inductor: a graph from the cache finds its histories, though no pass has run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def process(folder, how):
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "QUARTET_"))}
    environment = ours | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("delayed_process.py")), how], env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_histories_of_a_cached_graph(tmp_path):
    cold, warm, eager = (process(tmp_path, how) for how in ("inductor", "inductor", "stand-in"))
    assert cold["hits"] == [0, 0] and warm["hits"][1] == 1 and cold["bypass"] == warm["bypass"] == 0
    for name in ("losses", "state", "gradient"):
        assert warm[name] == cold[name], name
    assert cold["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    for key, rows in eager["state"].items():
        assert cold["state"][key] == pytest.approx(rows, rel=1e-3), key
    assert len(cold["state"]) == 6 and all(0 not in rows for rows in cold["state"].values())
