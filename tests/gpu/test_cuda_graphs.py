"""Every recipe in CUDA graphs: the bits of the same steps without."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from quartet.recipes import recipes
from quartet.runtime.compat import list_mode_options

pytestmark = pytest.mark.gpu
NAMES = [name for name, recipe in recipes().items() if recipe.quantizes]
STEPS = 4  # one warms up, one records, and the others replay


def train(recipe, mode):
    """Output and gradients of every step, and how many graphs were launched kernel by kernel all the same."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(3)]).to("cuda", torch.bfloat16)
    x, e = (torch.randn(128, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options = {"policy": recipe} | list_mode_options(mode)
    compiled, found = torch.compile(model, backend="quartet", options=options, dynamic=False), []
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        torch.manual_seed(step)
        model.zero_grad()
        y = compiled(x)
        y.backward(e)
        found.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    return found, counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("recipe", NAMES)
def test_replays_give_the_bits_of_launches(recipe):
    (launched, _), (replayed, skipped) = train(recipe, "default"), train(recipe, "reduce-overhead")
    assert skipped == 0
    for step, (wanted, got) in enumerate(zip(launched, replayed, strict=True)):
        differ = [int((a != b).sum()) for a, b in zip(got, wanted, strict=True)]
        assert not any(differ), f"step {step}: elements that differ in y and the gradients: {differ}"
