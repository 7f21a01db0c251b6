"""Random small models through the passes: what leaves everything alone changes no bit, and every recipe trains.

A failure names the shortest program that fails in the same way, as Python to paste into ``FOUND``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from programs import Program, program
from shorter import shortest
from torch import Tensor

from quartet.backend import compile_graph
from quartet.lowering.recipe.types import OP_CLASSES
from quartet.options import Options
from quartet.policy import Policy
from quartet.policy.possible import obstacle
from quartet.recipes import built_in
from quartet.runtime.capture import Capture
from quartet.runtime.compat import compile_fx

COUNT = int(os.environ.get("QUARTET_FUZZ", 30))
RECIPES = [recipe for recipe in built_in() if recipe.quantizes]
COSINE = {"e2m1": 0.6, "ternary": 0.3}  # of all gradients together with those in full precision; 8 bits: 0.95
PRODUCTS = ("linear", "router", "lm_head", "conv", "grouped", "attention_qk", "attention_pv", "bmm")

FOUND: tuple[Program, ...] = ()  # what failed once


@dataclass
class Run:
    """What the calls of a program gave: outputs, gradients by name, and what was quantised."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    lowered: int


class Failure(Exception):
    """A program that does what none may; the first word is the kind of it."""


def everywhere(recipe: Any) -> Policy:
    """A recipe on every op class that it is possible on."""
    policy = Policy(recipe.name)
    for op in PRODUCTS:
        if op in OP_CLASSES and obstacle(recipe, op) is None:
            policy = policy.on(op, recipe.name)
    return policy


def backend(policy: Policy | None, records: list[Any]) -> Callable[..., Any]:
    if policy is None:
        return lambda gm, inputs: compile_fx(gm, inputs, inner_compile=Capture())
    return lambda gm, inputs: compile_graph(gm, inputs, Options(policy), Capture(), records.extend)


def run(what: Program, policy: Policy | None) -> Run:
    """Forward and backward of every call; None: PyTorch's own passes."""
    torch._dynamo.reset()
    model, records, outputs = what.build(), [], []
    compiled = torch.compile(model, backend=backend(policy, records), dynamic=len(what.times) > 1)
    for x, indices in what.inputs():
        torch.manual_seed(2)
        x = x.requires_grad_()
        y = compiled(x, indices)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
        (y * direction).sum().backward()
        outputs += [y.detach(), x.grad]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Run(outputs, gradients, sum(record.lowered for record in records))


def check(what: Program, recipe: Any) -> None:
    """Raises Failure, or whatever a run raises."""
    plain, same = run(what, None), run(what, Policy("bf16"))
    if same.lowered or not _equal(plain, same):
        raise Failure("changed: a policy that leaves everything alone changes numbers")
    ours = run(what, everywhere(recipe))
    if ours.gradients.keys() != plain.gradients.keys():
        raise Failure(f"lost: gradients of {ours.gradients.keys() ^ plain.gradients.keys()}")
    tensors = [*ours.outputs, *ours.gradients.values()]
    if not all(torch.isfinite(t).all() for t in tensors):
        raise Failure("infinite: a result is not finite")
    a, b = (torch.cat([t.double().flatten() for t in (*r.outputs, *r.gradients.values())]) for r in (ours, plain))
    cosine = float(a @ b / (a.norm() * b.norm()))
    least = next((bound for element, bound in COSINE.items() if element in repr(recipe)), 0.95)
    if cosine < least:
        raise Failure(f"far: cosine {cosine:.3f} with full precision, {least} is the least")


def _equal(a: Run, b: Run) -> bool:
    return a.gradients.keys() == b.gradients.keys() and all(
        torch.equal(s, t) for s, t in zip((*a.outputs, *a.gradients.values()), (*b.outputs, *b.gradients.values()),
                                          strict=True))


def outcome(what: Program, recipe: Any) -> tuple[str, str]:
    """("", "") or the kind of a failure and its text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(what, recipe)
        except Failure as failure:
            return str(failure).partition(":")[0], str(failure)
        except Exception as error:  # noqa: BLE001  whatever is raised is a failure of its own kind
            return type(error).__name__, str(error)
    return "", ""


def judged(what: Program, recipe: Any) -> None:
    kind, text = outcome(what, recipe)
    if kind:
        short = shortest(what, lambda other: outcome(other, recipe)[0] == kind)
        pytest.fail(f"{recipe.name}: {kind}: {text}\nthe shortest that fails so: {short!r}")


@pytest.mark.parametrize("seed", range(COUNT))
def test_program(seed):
    judged(program(seed), RECIPES[seed % len(RECIPES)])


@pytest.mark.parametrize("what", FOUND, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_found(what, recipe):
    judged(what, recipe)
