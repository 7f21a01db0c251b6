"""``reduce_fp8.py``: its reductions are what they say."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("reduce_fp8")


def gradients(ranks=3, steps=4):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(40, 33, generator=generator) for _ in range(ranks)] for _ in range(steps)]


@pytest.mark.parametrize("name", ["fp8 tensor", "fp8 block"])
def test_what_feedback_leaves_out_is_sent_later(script, name):
    kept, sent, whole = [torch.zeros(40, 33) for _ in range(3)], torch.zeros(40, 33), torch.zeros(40, 33)
    for step in gradients():
        sent += script.REDUCTIONS[f"{name}, feedback"](step, kept)
        whole += sum(step)
    torch.testing.assert_close(sent + sum(kept), whole)
    plain = sum(script.REDUCTIONS[name](step, kept) for step in gradients())
    assert (sent - whole).norm() < 0.7 * (plain - whole).norm()


def test_codes_are_as_near_as_their_format_is(script):
    (step,) = gradients(steps=1)
    for name, least, most in (("fp32", 0, 1e-6), ("bf16", 1e-4, 4e-3), ("fp8 tensor", 1e-2, 4e-2),
                              ("fp8 block", 1e-2, 4e-2)):
        error = script.REDUCTIONS[name](step, [torch.zeros(1)] * 3) - sum(step)
        assert least <= error.norm() / sum(step).norm() <= most, name


def test_a_run_has_a_loss(script):
    corpus = script.Corpus(*(torch.arange(200, dtype=torch.uint8) for _ in range(2)), "counting")
    args = Namespace(size="tiny", seq=8, ranks=2, steps=2, batch=1, lr=1e-3)
    losses = {name: script.train(reduction, 0, args, corpus) for name, reduction in script.REDUCTIONS.items()}
    assert len(set(losses.values())) > 1 and all(4 < loss < 7 for loss in losses.values())
