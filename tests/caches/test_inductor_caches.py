"""Inductor's caches on disk: a second process finds what the first compiled, unless anything changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHANGES = ["policy", "recipe", "recipe changed under its name", "option", "disable_kernels", "source", "threads"]
NUMERIC = {"policy", "recipe changed under its name"}
SHORT = ["short last batch", "short first batch"]
HIT, MISS, UNASKED = [1, 0], [0, 1], [0, 0]


def process(folder, *names):
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "QUARTET_"))}
    environment = ours | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("one_process.py")), *names], env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(what a cold process did, what a second one did with the same folder)"""
    folder = tmp_path_factory.mktemp("inductor")
    return (process(folder, "base", *SHORT),
            process(folder, "base", "base without AOTAutogradCache", *CHANGES, *SHORT))


def test_a_cold_process_compiles(runs):
    cold = runs[0]["base"]
    assert cold["aot"] == MISS and cold["fx"] == [0, 2]


def test_an_unchanged_process_hits_aotautograd_cache(runs):
    assert runs[1]["base"]["aot"] == HIT and runs[1]["base"]["fx"][1] == 0


def test_an_unchanged_process_hits_the_graph_cache(runs):
    assert runs[1]["base without AOTAutogradCache"]["fx"] == [2, 0]
    assert runs[1]["base without AOTAutogradCache"]["aot"] == UNASKED


def test_a_hit_says_what_was_decided_when_it_was_compiled(runs):
    (cold,), (warm,) = runs[0]["base"]["said"], runs[1]["base"]["said"]
    assert cold.startswith("compiled: 3 of 3 matmuls quantised; 3 × quartet by ")
    assert warm.startswith("from the compile cache: compiled 20") and warm.endswith(cold.removeprefix("compiled"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_misses(runs, change):
    assert runs[1][change]["aot"] == MISS and runs[1][change]["fx"] == [0, 2]


def test_nothing_bypasses_the_caches(runs):
    assert [run["bypass"] for found in runs for run in found.values()] == [0] * (len(CHANGES) + 3 + 2 * len(SHORT))


def test_results_of_a_hit_are_those_of_a_cold_run_bit_for_bit(runs):
    cold = runs[0]["base"]["result"]
    assert runs[1]["base"]["result"] == runs[1]["base without AOTAutogradCache"]["result"] == cold
    assert {change for change in CHANGES if runs[1][change]["result"] != cold} == NUMERIC


def test_a_short_batch_is_decided_alike_where_a_cache_answers(runs):
    """Its wgrad is quantised after a long one and exact when it comes first: that is remembered before any cache."""
    cold, warm = ([run[name] for name in SHORT] for run in runs)
    assert [run["aot"] for run in cold] == [[0, 2], [0, 1]] and [run["aot"] for run in warm] == [[2, 0], [1, 0]]
    assert [run["result"] for run in cold] == [run["result"] for run in warm]
    assert cold[0]["result"] != cold[1]["result"]
