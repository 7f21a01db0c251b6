"""accelerate without a ``Trainer``: what ``prepare`` makes of a model that was compiled in place, and resuming."""

import os
from pathlib import Path

import gloo
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import quartet

accelerate = pytest.importorskip("accelerate")

STEPS, HALF, WIDTH = 4, 2, 64
POLICY = quartet.Policy("quartet").on("down", "fp8-delayed")


@pytest.fixture(autouse=True)
def own_settings():
    """accelerate's are those of the process, here and in what a Trainer runs on."""
    def forget():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    forget()
    yield
    forget()


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, 96), nn.Linear(96, WIDTH)

    def forward(self, x):
        return self.down(self.mid(self.up(x).relu()).relu())


def rows():
    """As many as four steps of two micro-batches read on each of two ranks."""
    return torch.randn(STEPS * 2 * 32 * 2, WIDTH, generator=torch.Generator().manual_seed(5))


def train(folder, policy, start=0, register=True):
    """Losses of the micro-batches and weights after training from step ``start``; saves after step ``HALF``."""
    torch._dynamo.reset()
    torch.manual_seed(7 + start)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = quartet.compile(_seeded(), policy, strict=True)
    if register:
        accelerator.register_for_checkpointing(quartet.State(model))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2),
                                                   DataLoader(rows(), batch_size=32, generator=torch.Generator()))
    if start:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, 2 * start)
    losses = []
    for x in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if start + len(losses) / 2 == HALF:
            accelerator.save_state(folder)
    weights = {name: p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()}
    return losses, weights, type(accelerator.unwrap_model(model)) is MLP


def _seeded():
    torch.manual_seed(0)
    return MLP()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("policy", [pytest.param("quartet", id="quartet"), pytest.param(POLICY, id="delayed")])
def test_resumed_bit_for_bit(tmp_path, policy):
    losses, weights, kept = train(tmp_path, policy)
    assert kept and losses[-1] < losses[0]
    again, resumed, _ = train(tmp_path, policy, start=HALF)
    assert again == losses[2 * HALF:] and equal(weights, resumed)


def test_without_the_registered_state_histories_begin_anew(tmp_path):
    _, weights, _ = train(tmp_path, "fp8-delayed", register=False)
    _, resumed, _ = train(tmp_path, "fp8-delayed", start=HALF, register=False)
    assert not equal(weights, resumed)


def both(rank, folder):
    """What each of two ranks finds: the whole run, and one that goes on from the middle of it."""
    from uncompiled import uncompiled

    torch._dynamo.lookup_backend("quartet")
    torch._dynamo.backends.registry._COMPILER_FNS["quartet"] = uncompiled
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="1",
                      MASTER_ADDR="localhost", MASTER_PORT="0")  # asked for, and not used: there is a group
    found = [train(folder, POLICY, start) for start in (0, HALF)]
    return {"whole": found[0][:2], "resumed": found[1][:2]}


@gloo.available
def test_two_ranks(tmp_path):
    ranks = gloo.run(Path(__file__), "both", tmp_path)
    for found in ranks:
        (losses, weights), (again, resumed) = found["whole"], found["resumed"]
        assert again == losses[2 * HALF:] and equal(weights, resumed)
    assert equal(ranks[0]["whole"][1], ranks[1]["whole"][1]), "the ranks hold one model"
    assert ranks[0]["whole"][0] != ranks[1]["whole"][0], "of different rows"
