"""The FP8 system as a user runs it: it learns, its states are a quarter, and a resumed run goes on bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ("--size", "tiny", "--layers", "1", "--batch", "2", "--seq", "32", "--steps", "12")
SYSTEM = "fp8-trillion"


def train(folder: Path, *arguments: str) -> None:
    command = [sys.executable, str(EXAMPLES / "fp8_trillion.py"), *TINY, "--out", str(folder / "out"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A folder with a comparing run of 12 steps, with an outlier, and its checkpoints at steps 6 and 12."""
    folder = tmp_path_factory.mktemp("unbroken")
    text = "".join(f"{n} bottles of beer on the wall, " for n in range(400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    train(folder, "--data", "text.txt", "--outlier", "300", "--checkpoint", "at-{step}.pt", "--checkpoint-every", "6")
    return folder


def test_it_reports_losses_and_bytes(unbroken):
    result = json.loads((unbroken / "out/result.json").read_text(encoding="utf-8"))
    system, plain, baseline = (result["runs"][name] for name in (SYSTEM, "fp8-delayed", "inductor"))
    for run in (system, plain, baseline):
        assert run["losses"][-1] < run["losses"][0] - 0.3
        assert abs(run["validation_loss"] - baseline["validation_loss"]) < 0.3
    assert system["losses"] != plain["losses"] != baseline["losses"] != system["losses"]
    assert 0.25 <= system["state_bytes"] / baseline["state_bytes"] < 0.27
    assert 0 < system["saved_bytes"] < baseline["saved_bytes"]


def test_smoothing_lowers_the_error_that_an_outlier_makes(unbroken):
    errors = json.loads((unbroken / "out/result.json").read_text(encoding="utf-8"))["gradient_errors"]["at the start"]
    assert errors["inductor"]["all"] < 1e-4
    assert 0 < errors[SYSTEM]["others"] < 0.5 * errors["fp8-delayed"]["others"], errors


def test_a_resumed_run_continues_bit_for_bit(unbroken, tmp_path):
    train(tmp_path, "--data", str(unbroken / "text.txt"), "--outlier", "300", "--no-compare", "--resume",
          str(unbroken / "at-6.pt"), "--checkpoint", "resumed.pt")
    resumed, expected, middle = (torch.load(p, weights_only=True)["runs"][SYSTEM] for p in (
        tmp_path / "resumed.pt", unbroken / "at-12.pt", unbroken / "at-6.pt"))
    assert resumed["losses"] == expected["losses"]
    for name, weight in expected["model"].items():
        assert torch.equal(resumed["model"][name], weight), name
    slots, earlier = (run["quartet"]["delayed"] for run in (expected, middle))
    for smoothed, measured in ((True, {"x:smooth-channel", "w:smooth-channel", "e"}), (False, {"x", "w", "e"})):
        assert {name.rsplit(".", 1)[-1] for name in slots if (".down_proj." in name) is smoothed} == measured
    for name, slot in slots.items():
        assert torch.equal(resumed["quartet"]["delayed"][name]["amax"], slot["amax"]), name
        assert not torch.equal(earlier[name]["amax"], slot["amax"]), name
    for number, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(resumed["optimizer"]["state"][number][name], value), (number, name)
