"""Policies of saved activations in Inductor's caches on disk: found again by the same policy and by no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HIT, MISS = [1, 0], [0, 1]


def process(folder, *recipes):
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "QUARTET_"))}
    environment = ours | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("saved_process.py")), *recipes],
                          env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(what a cold process did, what a second one did with the same folder)"""
    folder = tmp_path_factory.mktemp("inductor")
    return process(folder, "none", "e4m3/16"), process(folder, "e4m3/16", "mesa8", "none")


def test_another_policy_is_no_hit(runs):
    cold, warm = runs
    assert [cold["none"]["aot"], cold["e4m3/16"]["aot"], warm["mesa8"]["aot"]] == [MISS] * 3
    assert len({cold["none"]["result"], cold["e4m3/16"]["result"], warm["mesa8"]["result"]}) == 3


def test_the_same_policy_is_a_hit_with_the_same_result(runs):
    cold, warm = runs
    for recipe in ("none", "e4m3/16"):
        assert warm[recipe]["aot"] == HIT and warm[recipe]["result"] == cold[recipe]["result"]


def test_nothing_bypasses_the_caches(runs):
    assert [run["bypass"] for found in runs for run in found.values()] == [0] * 5
