"""Every recipe trains a small language model for 120 steps, and several of them train one model together."""

from functools import cache
from itertools import islice

import pytest
import torch
from harness import compile_eager, compile_plain
from models import Llama

from quartet import Policy, recipes

STEPS, LENGTH = 120, 32
TEXT = ("Whatever is rounded to nearest is wrong by half a step at most; whatever is rounded at random is right on the "
        "average. ") * 8
QUANTISING = [name for name, recipe in recipes().items() if recipe.quantizes]
SAVING = [name for name, recipe in recipes().items() if recipe.saved is not None]


def batches():
    data = torch.tensor(list(TEXT.encode()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        start = torch.randint(len(data) - LENGTH - 1, (4, 1), generator=generator)
        window = data[start + torch.arange(LENGTH + 1)]
        yield window[:, :-1], window[:, 1:]


def losses(compile, steps=STEPS):
    """The loss of every step, in nats a byte."""
    torch.manual_seed(0)
    model = Llama(vocab=128)
    run = compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    found = []
    for tokens, targets in islice(batches(), steps):
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
    assert found[0] > 4.5 and settled(found) < settled(baseline()) + 0.2 < 1.0
    assert found != baseline()


@pytest.mark.parametrize("base", [None, "fp8"])
@pytest.mark.parametrize("name", SAVING)
def test_saved_activations_train(name, base):
    """As long as it takes from a guess to half of the loss; the steps after the first differ."""
    compiled = []

    def compile(model):
        run, backend = compile_eager(model, Policy(base).on(op="saved", recipe=name))
        compiled.append(backend)
        return run

    found, exact = losses(compile, 60), baseline()[:60]
    assert exact[0] > 4.5 and settled(exact) < 2.5 and abs(settled(found) - settled(exact)) < 0.1
    assert found != exact and (base is not None or found[0] == exact[0])
    kept = {op: compiled[0].count(op) for op in ("encode_saved", "decode_saved")}
    assert kept["encode_saved"] >= 3 and kept["decode_saved"] >= 3


def test_one_model_under_several_recipes():
    policy = (Policy("quartet").on("attention", "mxfp8").on("*.down", "nvfp4").on("lm_head", None)
              .on("embedding", "mxfp8").on(op="saved", recipe="e4m3/16"))
    found = losses(lambda model: compile_eager(model, policy, open_attention=True)[0])
    assert settled(found) < settled(baseline()) + 0.25
