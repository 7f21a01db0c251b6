"""A policy for a model from what its tensors would lose under each recipe, and what each is predicted to take.

    time(policy)  = Σ over layers of the time of its recipe, by the cost model (``quartet.lowering.cost``)
    error(layer, recipe)² = mean over its products A·Bᵀ of e_a + e_b        e = Σ(q − x)² / Σx²

The errors are measured, of forward and backward in the model's own dtype, on the user's data; the times are predicted.
A budget is either the error that no layer may exceed, within which each layer gets the fastest recipe, or a share of
the time that all layers take in the model's dtype, within which Σ error² is the least (exactly, a multiple-choice
knapsack).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quartet.backend import compile_graph
from quartet.explain import explain
from quartet.inspect.inspector import Inspector
from quartet.inspect.records import product_errors
from quartet.inspect.statistics import aligned
from quartet.lowering.cost import Layer, predict
from quartet.lowering.rates import Rates, rates_of
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import Recipe
from quartet.nearest import did_you_mean
from quartet.options import Options
from quartet.passes import pipeline
from quartet.passes.residuals.knapsack import Choice, Frontier
from quartet.policy import Policy
from quartet.recipes import resolve
from quartet.report.predicted import KERNELS
from quartet.report.text import shorten
from quartet.runtime.capture import Capture, settings_of, unchanged
from quartet.runtime.devices import Target

RECIPES = ("quartet", "nvfp4", "mxfp8", "fp8")
PLAIN = "bf16"  # the recipe that quantises nothing
_FINE = 10**15  # of a second, and of an error, in the whole numbers of the knapsack


@dataclass(frozen=True)
class Option:
    """One recipe for one layer: its predicted seconds, and its relative error, root mean square over its products."""

    recipe: str
    seconds: float
    error: float


@dataclass(frozen=True)
class Suggestion:
    """A policy, and what each layer gets.

    Args:
        chosen: layer → its recipe. options: layer → all that it could have, ``"bf16"`` first.
        target: what times are predicted for.
    """

    chosen: Mapping[str, Option]
    options: Mapping[str, Sequence[Option]]
    target: str
    recipes: Mapping[str, Recipe] = field(repr=False, default_factory=dict)

    @property
    def policy(self) -> Policy:
        """A rule a layer; what is no layer of a module's stays in the model's dtype."""
        made = Policy(PLAIN)
        for layer, option in self.chosen.items():
            if option.recipe != PLAIN:
                made = made.on(layer, self.recipes[option.recipe])
        return made

    @property
    def seconds(self) -> float:
        """Predicted, of all layers, forward and backward."""
        return sum(option.seconds for option in self.chosen.values())

    @property
    def plain_seconds(self) -> float:
        """The same in the model's dtype."""
        return sum(options[0].seconds for options in self.options.values())

    @property
    def error(self) -> float:
        """Root mean square over the layers."""
        squares = [option.error**2 for option in self.chosen.values()]
        return math.sqrt(sum(squares) / max(len(squares), 1))

    def within(self, budget: float | str) -> Suggestion:
        """What another budget of :func:`suggest` leads to. Raises ValueError for one that is none, or too small."""
        return replace(self, chosen=_choose(self.options, budget))

    def uniform(self, recipe: str) -> Suggestion:
        """The same recipe for every layer that can have it. Raises ValueError for one that was not measured."""
        legal = (PLAIN, *self.recipes)
        if recipe not in legal:
            raise ValueError(f"recipe {recipe!r} was not measured; {did_you_mean(recipe, legal)}possible: "
                             f"{', '.join(legal)}")
        chosen = {layer: next((o for o in options if o.recipe == recipe), options[0])
                  for layer, options in self.options.items()}
        return replace(self, chosen=chosen)

    def __str__(self) -> str:
        rows = [(shorten(layer, 48), o.recipe, f"{o.error:.2%}", f"{1e6 * o.seconds:.0f} µs",
                 f"{1e6 * self.options[layer][0].seconds:.0f} µs") for layer, o in self.chosen.items()]
        share = self.seconds / self.plain_seconds if self.plain_seconds else 1.0
        return "\n".join((aligned(("layer", "recipe", "error", "predicted", PLAIN), rows),
                          f"all layers: {share:.2f} of the time in {PLAIN} on {self.target}, as predicted; error "
                          f"{self.error:.2%}, root mean square over the layers"))


def suggest(model: nn.Module, data: Iterable[Any], budget: float | str, *,
            recipes: str | Recipe | Sequence[str | Recipe] = RECIPES, target: str | None = None, scale: int = 1,
            loss: Callable[[Any], Tensor] | None = None) -> Suggestion:
    """Propose a recipe for each linear layer of a model.

    The model runs forward and backward in its own dtype for each input; parameters, buffers, gradients and random state
    are as before afterwards, and no optimizer steps.

    Args:
        data: inputs, a few batches: of each a tensor, a tuple of positional or a mapping of keyword arguments.
        budget: the error that no layer may exceed, ``0.1``; or a share of the time in the model's dtype, ``"70%"``,
            within which the error is the least.
        recipes: one or several that layers may have, beside the model's dtype.
        target: the GPU that times are predicted for, ``"h200"``; the model's own unless given.
        scale: a small model that stands for a large one is priced as if its widths and its tokens were so many times
            larger; its errors are its own.
        loss: of what the model returns; unless given it is that, its ``loss``, or the mean square of a tensor.

    Raises:
        ValueError: a budget that is none, no data, or such as makes a layer's numbers NaN or infinite, a model without
            layers, no recipe, a scale below 1, or no rates for the target.
        TypeError: no model, or one batch in place of several.
    """
    _parsed(budget)
    if not (isinstance(scale, int | float) and 1 <= scale < math.inf and scale == int(scale)):
        raise ValueError(f"scale is a whole number, 1 or more, not {scale!r}")
    inner, *_ = settings_of(model)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"quartet.suggest takes a module, not {type(inner).__name__}")
    if isinstance(data, Tensor | Mapping) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise TypeError(f"data is several batches, not one {type(data).__name__}; give [batch]")
    batches = [_arguments(batch) for batch in data]
    if not batches:
        raise ValueError("data is empty: suggest measures errors on it; give a few batches")
    several = [recipes] if isinstance(recipes, str | Recipe) else recipes
    known = {recipe.name: recipe for recipe in map(resolve, several) if recipe is not None}
    if not known:
        raise ValueError("recipes is empty: name those that layers may have, such as 'fp8'")
    inspector = Inspector(every=1, what_if=known.values())
    chosen_for, rates = _rates(inner, target)
    _measure(inner, batches, inspector, loss or _loss)
    errors = product_errors(inspector.statistics())
    sharing = {name.rpartition(" fprop x ")[0]: len(row.names) for row in inspector.recorder.rows()
               if row.kind == "what-if" for name in row.names if " fprop x " in name}
    found: dict[str, list[Option]] = {}
    unknown: list[str] = []
    for recipe in known.values():
        for layer, calls in _layers(inner, batches[0], recipe, chosen_for).items():
            squares, seconds, plain = list[float](), 0.0, 0.0
            for number, records in enumerate(calls, 1):
                called = layer if number == 1 else f"{layer} ({number})"
                priced = _priced(recipe, records, sharing.get(called, 1), scale, rates)
                measured = [errors[key] for role in records if (key := (called, role, recipe.name)) in errors]
                if priced is None or len(measured) < len(records):
                    break
                if not all(map(math.isfinite, measured)):
                    unknown.append(layer)
                    break
                seconds, plain = seconds + priced[0], plain + priced[1]
                squares += [error**2 for error in measured]
            else:
                options = found.setdefault(layer, [Option(PLAIN, plain, 0.0)])
                options.append(Option(recipe.name, seconds, math.sqrt(sum(squares) / len(squares))))
    for layer in unknown:
        if layer not in found:
            raise ValueError(f"the error of {layer!r} is not a number under any of {', '.join(known)}: its numbers on "
                             "this data, or its gradients, are not finite; options={'check': 'finite'} names where "
                             "that begins. Leave such batches out")
    if not found:
        raise ValueError(f"no linear layer of {type(inner).__name__} can be quantised by {', '.join(known)} on "
                         f"{chosen_for.title} by a kernel whose speed is known; quartet.explain(model, *inputs, "
                         "target=…) says why")
    return Suggestion(_choose(found, budget), found, target or chosen_for.title, known)


def _choose(found: Mapping[str, Sequence[Option]], budget: float | str) -> dict[str, Option]:
    limit = _parsed(budget)
    return _least_error(found, limit) if isinstance(budget, str) else _fastest(found, limit)


def _parsed(budget: Any) -> float:
    text = isinstance(budget, str) and budget.endswith("%")
    try:
        value = float(budget[:-1]) / 100 if text else float(budget)
    except (TypeError, ValueError):
        value = -1.0
    if not value >= 0 or (isinstance(budget, str) and not (text and value < math.inf)) or isinstance(budget, bool):
        raise ValueError(f"budget {budget!r} is none: give the error that no layer may exceed, such as 0.1, or a share "
                         "of the time in the model's dtype, such as '70%'")
    return value


def _arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _loss(output: Any) -> Tensor:
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    value = own if own is not None else output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(value, Tensor):
        raise ValueError(f"the model returns {type(output).__name__}, of which no loss is known: give loss=…")
    return value if value.dim() == 0 else value.float().square().mean()


def _rates(model: nn.Module, target: str | None) -> tuple[Target, Rates]:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    chosen = Target.of(device) if target is None else Target.named(target)
    rates = rates_of(chosen)
    if rates is None:
        raise ValueError(f"no rates of {chosen.title} are known, by which times could be predicted; name a GPU, "
                         "target='h200' or 'b200'")
    return chosen, rates


def _measure(model: nn.Module, batches: Sequence[tuple[Any, Any]], inspector: Inspector,
             loss: Callable[[Any], Tensor]) -> None:
    """Errors of all recipes, in the model's own dtype."""
    options = Options.parse(None, {"policy": PLAIN, "inspect": inspector}, passes=pipeline.OPTIONAL)
    capture = Capture()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, options, inner_compile=capture, say=lambda *_: None, remember=False)

    with unchanged(model), torch.enable_grad():
        compiled = torch.compile(model, backend=backend)
        for args, kwargs in batches:
            for parameter in model.parameters():
                parameter.grad = None
            value = loss(compiled(*args, **kwargs))
            if not isinstance(value, Tensor) or value.numel() != 1:
                said = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss= gives a tensor of one number, not {said}")
            value.backward()


def _layers(model: nn.Module, batch: tuple[Any, Any], recipe: Recipe,
            target: Target) -> dict[str, list[dict[str, MatmulRecord]]]:
    """Layer → of each call of it role → product, of the linear layers of which a recipe quantises all that it has."""
    args, kwargs = batch
    report = explain(model, *args, options={"policy": Policy(recipe)}, target=target.name, **kwargs)
    found: dict[str, list[dict[str, MatmulRecord]]] = {}
    for record in report.records:
        if record.op_class == "linear" and record.fqn and getattr(recipe, record.role) is not None:
            calls = found.setdefault(record.fqn, [])
            if not calls or record.role in calls[-1]:
                calls.append({})
            calls[-1][record.role] = record
    return {layer: calls for layer, calls in found.items() if all(r.lowered for roles in calls for r in roles.values())}


def _priced(recipe: Recipe, records: Mapping[str, MatmulRecord], sharing: int, scale: int,
            rates: Rates) -> tuple[float, float] | None:
    """Seconds of a layer as the recipe has it and in the model's dtype; None where that is not known."""
    forward = records.get("fprop")
    if forward is None or forward.flops is None or forward.batch != 1:
        return None
    m, n, k = (scale * int(size) for size in (forward.m, forward.n, forward.k))
    kernels = {role: KERNELS.get(record.kernel or "") for role, record in records.items()}
    cost = predict(recipe, Layer(kernels, m, n, k, sharing, called=forward.called), rates)
    return None if cost is None else (cost.step, cost.plain_step)


def _fastest(found: Mapping[str, Sequence[Option]], limit: float) -> dict[str, Option]:
    """Of each layer the fastest option whose error is within the limit."""
    return {layer: min((o for o in options if o.error <= limit), key=lambda o: (o.seconds, o.error))
            for layer, options in found.items()}


def _least_error(found: Mapping[str, Sequence[Option]], share: float) -> dict[str, Option]:
    """The options of the least Σ error² that together take no more than a share of the time in the model's dtype."""
    items = [[Choice(round(o.seconds * _FINE), round(o.error**2 * _FINE)) for o in options]
             for options in found.values()]
    limit = share * sum(options[0].seconds for options in found.values())
    frontier = Frontier(items)
    point = frontier.within(round(limit * _FINE))
    if point is None:
        least = frontier.least().bytes / _FINE * share / limit if limit else math.inf
        raise ValueError(f"no choice takes {share:.0%} of the time in the model's dtype; the fastest takes {least:.0%}")
    return {layer: options[pick] for (layer, options), pick in zip(found.items(), point.picks, strict=True)}
