"""The shipped example as a user runs it: it learns, reports, and a resumed run is the unbroken one bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ("--size", "tiny", "--layers", "1", "--batch", "2", "--seq", "32", "--steps", "20")


def train(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train_llama.py"), *TINY, "--out", str(folder / "out"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A folder with a comparing run of 20 steps and its checkpoints at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("unbroken")
    text = "".join(f"{n} bottles of beer on the wall, " for n in range(400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    train(folder, "--data", "text.txt", "--checkpoint", "at-{step}.pt", "--checkpoint-every", "10")
    return folder


def test_it_reports_what_it_measured(unbroken):
    result = json.loads((unbroken / "out/result.json").read_text(encoding="utf-8"))
    assert set(result["runs"]) == {"quartet", "inductor"}
    for run in result["runs"].values():
        assert len(run["losses"]) == 20
        assert run["losses"][-1] < run["losses"][0] - 0.5
        assert run["validation_loss"] < 5.0
    ours, peer = result["runs"]["quartet"], result["runs"]["inductor"]
    assert ours["losses"] != peer["losses"]
    assert abs(result["comparison"]["validation_gap"]) < 0.3
    assert 0 < ours["saved_bytes"] < peer["saved_bytes"]
    assert result["matmuls"]
    assert {(row["model"], row["gpu"]) for row in result["predicted"]} == {
        (model, gpu) for model in ("1B", "8B") for gpu in ("h200", "b200")}
    assert all(0 < row["quartet"] < row["bf16"] for row in result["predicted"])


def test_it_leaves_pictures_and_graphs(unbroken):
    assert (unbroken / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<table" in (unbroken / "out/explain.html").read_text(encoding="utf-8")
    assert list((unbroken / "out/graphs").rglob("*_lower.py"))


def test_a_resumed_run_continues_bit_for_bit(unbroken, tmp_path):
    train(tmp_path, "--data", str(unbroken / "text.txt"), "--no-compare", "--resume", str(unbroken / "at-10.pt"),
          "--checkpoint", "resumed.pt")
    resumed, expected, middle = (torch.load(p, weights_only=True) for p in (
        tmp_path / "resumed.pt", unbroken / "at-20.pt", unbroken / "at-10.pt"))
    assert (middle["step"], resumed["step"], expected["step"]) == (10, 20, 20)
    assert resumed["runs"]["quartet"]["losses"] == expected["runs"]["quartet"]["losses"]
    weights = expected["runs"]["quartet"]["model"]
    for name, weight in resumed["runs"]["quartet"]["model"].items():
        assert torch.equal(weight, weights[name]), name
        assert not torch.equal(weight, middle["runs"]["quartet"]["model"][name]), name
    assert torch.equal(resumed["rng"], expected["rng"])
    assert not torch.equal(resumed["rng"], middle["rng"]), "stochastic rounding drew nothing from PyTorch's generator"


def test_a_checkpoint_of_other_settings_is_refused(unbroken, tmp_path):
    done = train(tmp_path, "--data", str(unbroken / "text.txt"), "--no-compare", "--lr", "0.1",
                 "--resume", str(unbroken / "at-10.pt"), check=False)
    assert done.returncode != 0
    assert "lr 0.001 there, 0.1 here" in done.stderr
