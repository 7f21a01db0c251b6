"""Compile a model as for a GPU that is not here, and look at its graphs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import quartet
from quartet.backend import compile_graph
from quartet.lowering import ir, registry
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.capture import Capture, Pretence
from quartet.runtime.devices import Target


class Traced(Exception):
    """The backward graph is there: nothing has to run."""


class _Stop(Pretence):
    def __call__(self, gm: GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        run = super().__call__(gm, example_inputs, **kwargs)
        if kwargs.get("is_backward"):
            raise Traced
        return run


def trace(target: str, model: Any, *inputs: Any, records: list | None = None, dynamic: bool = False,
          policy: Any = "quartet", **options: Any) -> list[GraphModule]:
    """Forward and backward graphs as compiled for ``target``; ``options`` as for the backend."""
    capture = _Stop()
    with pytest.raises(Traced):
        _compiled(target, model, capture, records, dynamic, policy, **options)(*inputs).sum().backward()
    torch._dynamo.reset()
    return capture.graphs


def carry_out(target: str, model: Any, x: torch.Tensor, policy: Any, gradient: torch.Tensor, seed: int = 1,
              rest: tuple[torch.Tensor, ...] = (), **options: Any) -> tuple[list[torch.Tensor], list[GraphModule]]:
    """Output and gradients, x's first, of the graphs compiled for ``target``, run eagerly here, and the graphs.

    ``rest``: what the model takes besides x.
    """
    capture = Capture()
    run = _compiled(target, model, capture, None, False, policy, **options)
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    out = run(x, *rest)
    grads = torch.autograd.grad(out, [x, *model.parameters()], gradient)
    torch._dynamo.reset()
    return [out.detach(), *grads], capture.graphs


def _compiled(target: str, model: Any, capture: Capture, records: list | None, dynamic: bool, policy: Any,
              **options: Any) -> Any:
    torch._dynamo.reset()
    parsed = options_for(target, policy, **options)

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        return compile_graph(gm, example_inputs, parsed, inner_compile=capture,
                             collect=records.extend if records is not None else None)

    return torch.compile(model, backend=backend, dynamic=dynamic)


def options_for(target: str | None, policy: Any, **options: Any) -> Options:
    """The options of a compilation; the recipe that ``policy`` names is also a rule on linear layers of any size."""
    if isinstance(policy, str) and policy in quartet.recipes():
        policy = quartet.Policy(policy).on("linear", policy)
    parsed = Options.parse(None, {"policy": policy, **options}, passes=pipeline.OPTIONAL,
                           kernels=registry.disableable())
    return parsed if target is None else replace(parsed, target=Target.named(target))


def targets(gm: GraphModule) -> Counter[Any]:
    """How often each op is called."""
    return Counter(node.target for node in gm.graph.nodes if node.op == "call_function")


def assert_no_semantics(*graphs: GraphModule) -> None:
    """Every semantic op has been lowered, but for signs, drawn or fixed."""
    for gm in graphs:
        left = set(targets(gm)) & {ir.HADAMARD, ir.AMAX, ir.QUANTIZE, ir.DEQUANTIZE, ir.APPLY_MASK, *ir.PRODUCTS}
        assert not left, left


def linear(dtype: torch.dtype = torch.bfloat16, k: int = 64, n: int = 96, tokens: int = 40) -> tuple[Any, torch.Tensor]:
    return torch.nn.Linear(k, n, bias=False, dtype=dtype), torch.randn(tokens, k, dtype=dtype, requires_grad=True)
