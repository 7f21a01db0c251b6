"""Seeds on a GPU: read from the generator's state where the forward draws itself, drawn under CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quartet.runtime.compat import list_mode_options
from quartet.runtime.streams import draw

pytestmark = pytest.mark.gpu


def test_reading_a_seed_leaves_the_generator():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state()
    seed = draw(device, moves=True)
    assert torch.equal(seed, draw(device, moves=True)) and torch.equal(before, torch.cuda.get_rng_state())
    torch.rand(1, device=device)
    assert not torch.equal(seed, draw(device, moves=True))
    torch.cuda.set_rng_state(before)
    assert torch.equal(seed, draw(device, moves=True))


def test_a_captured_seed_differs_in_every_replay():
    device, graph = torch.device("cuda", torch.cuda.current_device()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = draw(device, moves=True)
    found = []
    for _ in range(2):
        graph.replay()
        found.append(seed.clone())
    assert not torch.equal(*found)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x):
        h = self.up(x)
        kept = nn.functional.dropout(torch.ones_like(h), 0.5)  # a quantised product may be 0 by itself
        return self.down(h * kept), kept == 0


def dropped(backend, **options):
    """What each of three steps dropped, and the generator's state behind them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Dropping().to("cuda", torch.bfloat16)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(model, backend=backend, **options)
    torch.manual_seed(5)
    found = []
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        y, zeros = run(x)
        found.append(zeros.clone())
        y.square().mean().backward()
        model.zero_grad()  # gradients are outputs of a CUDA graph too
    return torch.stack(found), torch.cuda.get_rng_state()


def test_dropout_is_the_same_with_and_without_the_backend():
    ours, state = dropped("quartet", options={"policy": "quartet"})
    theirs, expected = dropped("inductor")
    assert torch.equal(ours, theirs) and torch.equal(state, expected) and not torch.equal(ours[0], ours[1])


def test_a_model_with_dropout_trains_under_cuda_graphs():
    found, _ = dropped("quartet", options={"policy": "quartet"} | list_mode_options("reduce-overhead"))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
