"""What the linear layers of a Llama at 1B and 8B parameters would take on a GPU that need not be here, by the cost
model: its prices are measured on an H200 and follow from data sheets elsewhere. Predictions, and no measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quartet import Recipe, recipes
from quartet.lowering import registry
from quartet.lowering.cost import Layer, predict
from quartet.lowering.rates import rates_of
from quartet.lowering.recipe.types import ROLES
from quartet.runtime.devices import Target

TOKENS = 8192  # of a step
MODELS = {  # name → (layers, (out, in) of the linear layers of each), as of Llama 3
    "1B": (16, ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))),
    "8B": (32, ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))),
}


def predictions(gpus: Sequence[str] = ("h200", "b200"), names: Sequence[str] = ("fp8", "quartet")) -> Iterator[dict]:
    """A row a model and GPU: milliseconds of all linear layers of a step in bf16, and by recipe, in those that it makes
    faster; None where the cost model has no price of a kernel."""
    for model, (layers, shapes) in MODELS.items():
        for gpu in gpus:
            rows = {name: [_seconds(recipes()[name], n, k, gpu) for n, k in shapes] for name in names}
            plain = [pair[0] for pair in next(iter(rows.values())) if pair is not None]
            yield {"model": model, "gpu": gpu, "bf16": 1e3 * layers * sum(plain) if len(plain) == len(shapes) else None,
                   **{name: None if None in pairs else 1e3 * layers * sum(min(pair) for pair in pairs if pair)
                      for name, pairs in rows.items()}}


def _seconds(recipe: Recipe, n: int, k: int, gpu: str) -> tuple[float, float] | None:
    """(in bf16, under the recipe) of the three products of a layer."""
    target = Target.named(gpu)
    rates = rates_of(target)
    kernels = {role: registry.multiplies(getattr(recipe, role), target, torch.bfloat16) for role in ROLES}
    cost = None if rates is None else predict(recipe, Layer(kernels, TOKENS, n, k), rates)
    return None if cost is None else (max(float(cost.plain), float(cost.plain_host)), cost.step)


def told(rows: Sequence[dict]) -> str:
    """The predictions as lines."""
    lines = [f"predicted by the cost model, not measured: ms of all linear layers in a step of {TOKENS} tokens"]
    for row in rows:
        known = [f"{name} {row[name]:.1f}" + (f" ({row['bf16'] / row[name]:.2f}×)" if name != "bf16" else "")
                 if row[name] is not None and row["bf16"] is not None else f"{name} –"
                 for name in row if name not in ("model", "gpu")]
        lines.append(f"  Llama {row['model']} on {row['gpu'].upper()}: {', '.join(known)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(told(list(predictions())))
