"""Every recipe trains a small language model for 200 steps, and several of them train one model together."""

from functools import cache

import pytest
import torch
from harness import compile_eager, compile_plain
from models import Llama

from quartet import Policy, recipes

STEPS, LENGTH = 200, 32
TEXT = ("Whatever is rounded to nearest is wrong by half a step at most; whatever is rounded at random is right on the "
        "average. ") * 8
QUANTISING = [name for name, recipe in recipes().items() if recipe.quantizes]


def batches():
    data = torch.tensor(list(TEXT.encode()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        start = torch.randint(len(data) - LENGTH - 1, (4, 1), generator=generator)
        window = data[start + torch.arange(LENGTH + 1)]
        yield window[:, :-1], window[:, 1:]


def losses(compile):
    """The loss of every step, in nats a byte."""
    torch.manual_seed(0)
    model = Llama(vocab=128)
    run = compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    found = []
    for tokens, targets in batches():
        loss = run(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@cache
def baseline():
    return losses(compile_plain)


def settled(found):
    return sum(found[-20:]) / 20


@pytest.mark.parametrize("name", QUANTISING)
def test_a_recipe_trains(name):
    found = losses(lambda model: compile_eager(model, name)[0])
    assert found[0] > 4.5 and settled(found) < settled(baseline()) + 0.25 < 1.0
    assert found != baseline()


def test_one_model_under_several_recipes():
    policy = (Policy("quartet").on("attention", "fp8").on("*.down", "nvfp4").on("lm_head", None)
              .on("embedding", "mxfp8").on(op="saved", recipe="e4m3/16"))
    found = losses(lambda model: compile_eager(model, policy, open_attention=True)[0])
    assert settled(found) < settled(baseline()) + 0.25
