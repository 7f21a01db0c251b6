"""Compile through the real dynamo, AOTAutograd, partitioner and passes, and run the result eagerly.

Only Inductor's code generation is replaced, by ``Capture``: a compilation takes a second instead of minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.lowering.recipe.records import MatmulRecord
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.capture import Capture
from quartet.runtime.compat import compile_fx

ALL = frozenset({"fprop", "dgrad", "wgrad"})
FIRST = frozenset({"fprop", "wgrad"})  # the input requires no gradient


@dataclass
class Backend:
    """A torch.compile backend that keeps what it made."""

    compile: Callable[..., Any]
    capture: Capture = field(default_factory=Capture)
    records: list[MatmulRecord] = field(default_factory=list)
    calls: int = 0

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        self.calls += 1
        return self.compile(self, gm, inputs)

    def lowered(self) -> dict[str, frozenset[str]]:
        """Module name → roles that a kernel of ours runs."""
        return _roles(r for r in self.records if r.lowered)

    def alone(self) -> dict[str, frozenset[str]]:
        """Module name → roles left alone."""
        return _roles(r for r in self.records if not r.lowered)

    def forwards(self) -> list[GraphModule]:
        return self.capture.graphs[0::2]

    def backwards(self) -> list[GraphModule]:
        return self.capture.graphs[1::2]

    def count(self, op: str) -> int:
        """Nodes of ``quartet::op`` in all graphs."""
        return sum(count(gm, op) for gm in self.capture.graphs)


def _roles(records: Iterable[MatmulRecord]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for r in records:
        found[r.fqn] = found.get(r.fqn, frozenset()) | {r.role}
    return found


def count(gm: GraphModule, op: str) -> int:
    """Nodes of ``quartet::op`` in one graph."""
    return sum(str(n.target).startswith(f"quartet.{op}.") for n in gm.graph.nodes)


def eager_backend(policy: Any = "quartet", **options: Any) -> Backend:
    """The quartet backend with the stand-in; ``options`` as for ``torch.compile``."""
    parsed = Options.parse(None, {"policy": policy, **options}, passes=pipeline.OPTIONAL, kernels=registry.NAMES)

    def compile(backend: Backend, gm: GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, parsed, inner_compile=backend.capture, collect=backend.records.extend)

    return Backend(compile)


def plain_backend() -> Backend:
    """torch.compile's own backend with the same stand-in."""
    return Backend(lambda backend, gm, inputs: compile_fx(gm, inputs, inner_compile=backend.capture))


def compile_eager(model: Any, policy: Any = "quartet", *, fullgraph: bool = True, dynamic: bool | None = None,
                  **options: Any) -> tuple[Any, Backend]:
    """The compiled model, and the backend that fills as it compiles."""
    backend = eager_backend(policy, **options)
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic), backend


def compile_plain(model: Any, **kwargs: Any) -> Any:
    return torch.compile(model, backend=plain_backend(), **kwargs)


def loss_of(out: Tensor) -> Tensor:
    """A scalar of the outputs that is not the model's own loss: their mean square."""
    return out if out.dim() == 0 else out.float().square().mean()


def step(run: Any, model: nn.Module, inputs: Iterable[Any], seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, by name, of one step from ``seed``; those of inputs are named ``input0``…"""
    inputs = tuple(inputs)
    model.zero_grad()
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None
    torch.manual_seed(seed)
    loss = loss_of(run(*inputs))
    loss.backward()
    named = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    named |= {f"input{i}": x.grad.clone() for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.grad is not None}
    return loss.detach(), named


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Loss and all gradients are equal bit for bit."""
    assert torch.equal(a[0], b[0]), (a[0].item(), b[0].item())
    assert a[1].keys() == b[1].keys()
    different = [name for name in a[1] if not torch.equal(a[1][name], b[1][name])]
    assert not different, f"gradients differ: {different}"


def assert_close(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], least: float = 0.65) -> None:
    """Gradients are finite, present alike, and point the same way; the losses agree within a half."""
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        assert torch.isfinite(grad).all(), f"{name} is not finite"
        assert cosine(grad, b[1][name]) > least, f"{name}: cosine {cosine(grad, b[1][name]):.3f}"
    torch.testing.assert_close(a[0], b[0], rtol=0.5, atol=1e-3, check_dtype=False)
