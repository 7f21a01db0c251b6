"""Under ``strict=True``: layers that the policy quantises and that no graph holds are an error, once the model has run.

A backend sees graphs and not what runs beside them. So a graph that is called again, after the whole model has been
called once, looks whether all layers with matrices were in some graph, where dynamo has ended one early or left a
function to Python; a layer that no call reaches is told from one in eager only by ``quartet.explain``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import nn

from quartet.model.flat import own_parameters, path_in_model
from quartet.model.judge import Judge
from quartet.model.names import Names
from quartet.passes.classify.by_name import class_by_name
from quartet.passes.naming import module_name
from quartet.passes.plan.plan import UnsupportedMatmul
from quartet.runtime.breaks import left_since

LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase)


class Whole:
    """A compiled graph that asks for the rest of its model when it is called for the second time."""

    def __init__(self, compiled: Callable[..., Any], judge: Judge, names: Names) -> None:
        self.compiled, self.judge, self.names = compiled, judge, names
        self._model = ref(names.model) if names.model is not None else lambda: None
        self._calls = 0

    def __call__(self, *args: Any) -> Any:
        self._calls += 1
        if self._calls == 2:
            self._refuse()
        return self.compiled(*args)

    def _refuse(self) -> None:
        """Raise UnsupportedMatmul for layers of the model that no graph holds and the policy quantises."""
        model, breaks = self._model(), left_since(self.judge.since)
        if model is None or not (self.judge.broken or breaks):
            return
        missing = [name for name, n, k in _matrices(model) if name not in self.judge.held and self._wanted(name, n, k)]
        if missing:
            layers = list(dict.fromkeys(map(module_name, missing)))
            shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
            raise UnsupportedMatmul(
                f"strict=True, and no graph holds {shown}: they run in eager after a graph break"
                f"{f' ({breaks[0].why})' if breaks else ''}, or not at all. quartet.explain(model, …) says which and "
                f"where; a rule .on({layers[0]!r}, None) leaves a layer alone")

    def _wanted(self, parameter: str, n: int, k: int) -> bool:
        policy = self.judge.policy
        name = module_name(parameter)
        choice = policy.resolve(class_by_name(name), name, n, n, k).fprop
        return choice.gemm is not None and (choice.rule is not None or not policy.where_it_pays)


def _matrices(model: nn.Module) -> list[tuple[str, int, int]]:
    """(name, out, in) of the matrices of layers that multiply."""
    return [(".".join(filter(None, (path_in_model(path), name))), parameter.shape[0], parameter.shape[-1])
            for path, module in nn.Module.named_modules(model) if isinstance(module, LAYERS)
            for name, parameter in own_parameters(module).items() if parameter.dim() > 1]
