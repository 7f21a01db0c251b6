"""What one pass does to the joint graph of a small model, as short text.

    change = around("share", model, x, policy="fp8")

compiles the model through dynamo, AOTAutograd and the passes and keeps the graph before and after the named pass, a
line a node. Nodes are numbered in the order in which the text names them. Inputs are called by the parameter they
are, or ``x``, ``x1``, … what the model is called with, ``g`` the gradient of its result, ``anchor`` what delayed
scaling finds its histories by, ``token`` what statistics are recorded by. After the bar stands ``bwd`` for a node of
backward, ``!`` where a node is pinned to its direction, ``?`` where it has none, and what activation checkpointing is
told.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from traced import options_for

from quartet.backend import compile_graph
from quartet.lowering.recipe.records import MatmulRecord
from quartet.passes.compilation import Observer
from quartet.policy.recipes import remembers
from quartet.report.graph_code import DTYPE_NAMES, describe, op_name
from quartet.runtime.capture import Pretence

DIRECTIONS = {"is_forward": "", "is_backward": "bwd", "must_be_in_forward": "!", "must_be_in_backward": "bwd!"}
LONGEST = 8  # numbers of a list that are shown
ASCII = str.maketrans({"×": "x", "→": "->", "·": "*"})  # expecttest writes no other text


@dataclass
class Change:
    """The graph around a pass, as lines, and what the compilation reports of each product.

    Attributes:
        before, after: None where the pass has not run.
    """

    before: list[str] | None = None
    after: list[str] | None = None
    records: list[MatmulRecord] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The lines taken away after ``-``, those put in after ``+``, and before them the nodes that they read."""
        assert self.before is not None and self.after is not None, "the pass has not run"
        changed: list[str] = []
        matches = SequenceMatcher(None, self.before, self.after, autojunk=False)
        for what, i, j, k, m in matches.get_opcodes():
            if what != "equal":
                changed += [f"- {line}" for line in self.before[i:j]] + [f"+ {line}" for line in self.after[k:m]]
        made = {line.split()[1] for line in changed}
        read = set(re.findall(r"%\d+", "\n".join(changed))) - made
        text = "\n".join([f"  {line}" for line in self.before if line.split()[0] in read] + changed)
        numbers: dict[str, str] = {}
        return re.sub(r"%\d+", lambda found: numbers.setdefault(found[0], f"%{len(numbers)}"), text)

    @property
    def decisions(self) -> str:
        """A line a product: module, op class, role, sizes, and its recipe or why it is left alone."""
        return "\n".join(
            f"{r.fqn or '-'} {r.op_class} {r.role} {'' if r.batch == 1 else f'{r.batch} x '}{r.m} x {r.n} x {r.k}: "
            f"{r.recipe if r.kernel else r.reason}{''.join(f'; {note}' for note in r.notes)}" for r in self.records
        ).translate(ASCII)


def around(name: str, model: nn.Module, *inputs: Tensor, policy: Any = "quartet", target: str | None = None,
           dynamic: bool = False, **options: Any) -> Change:
    """What the pass ``name`` does to the one graph of ``model(*inputs)``; policy, target and options as for a trace."""
    parsed, change = options_for(target, policy, **options), Change()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        anchors = ["anchor"] if remembers(parsed.policy) else []
        watch = _Watch(name, change, [*_names(model, example_inputs), *anchors, "token"])
        return compile_graph(gm, example_inputs, parsed, Pretence(), change.records.extend, say=lambda *_: None,
                             remember=False, observers=(watch,))

    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    torch.compiler.reset()
    return change


class _Watch(Observer):
    """An observer of the passes that writes down the graph around one of them."""

    def __init__(self, name: str, change: Change, inputs: list[str]) -> None:
        self.name, self.change, self.inputs = name, change, inputs
        self.names: dict[Node, str] = {}

    def before(self, index: int, name: str, gm: GraphModule) -> None:
        if name == self.name:
            self.change.before = self._lines(gm.graph)

    def after(self, index: int, name: str, gm: GraphModule, seconds: float) -> None:
        if name == self.name:
            self.change.after = self._lines(gm.graph)

    def _lines(self, graph: Graph) -> list[str]:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = self._input(node)
            elif node not in self.names:
                self.names[node] = f"%{sum(name.startswith('%') for name in self.names.values())}"
        return [self._line(node) for node in graph.nodes if node.op != "placeholder"]

    def _input(self, node: Node) -> str:
        number = node.name.removeprefix("tangents_")
        if number != node.name:
            return f"g{'' if number == '1' else number}"
        desc = node.meta["desc"]
        return self.inputs[desc.idx] if hasattr(desc, "idx") else f"{self.inputs[desc.base.idx]}.{desc.attr}"

    def _line(self, node: Node) -> str:
        arguments = [self._text(a) for a in node.args] + [f"{key}={self._text(a)}" for key, a in node.kwargs.items()]
        if node.op == "output":
            return f"return {arguments[0]}"
        call = (f"{arguments[0]}[{arguments[1]}]" if node.target is operator.getitem else
                f"{op_name(node).rpartition('.')[2]}({', '.join(arguments)})")
        told = DIRECTIONS[node.meta["partitioner_tag"]] if "partitioner_tag" in node.meta else "?"
        told += f" {node.meta['recompute'].name.lower()}" if "recompute" in node.meta else ""
        return f"{self.names[node]} = {call} : {describe(node.meta.get('val'))}{f' | {told.strip()}' if told else ''}"

    def _text(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, list | tuple):
            shown = [*map(self._text, value[:LONGEST])] + [f"... {len(value)}"] * (len(value) > LONGEST)
            return f"[{', '.join(shown)}]"
        return DTYPE_NAMES.get(value) or (str(value) if isinstance(value, torch.device) else repr(value))


def _names(model: nn.Module, example_inputs: Sequence[Any]) -> list[str]:
    """What each input of dynamo's graph is called."""
    own = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
    names: list[str] = []
    for value in example_inputs:
        kind = "x" if isinstance(value, Tensor) else "s"
        number = sum(re.fullmatch(rf"{kind}\d*", name) is not None for name in names)
        names.append(own.get(id(value)) or f"{kind}{number or ''}")
    return names


def matrix(*shape: int, grad: bool = True) -> Tensor:
    """An input of a model in bfloat16."""
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(grad)


def linear(inputs: int = 32, outputs: int = 64, bias: bool = False, trained: bool = True) -> nn.Linear:
    """A layer in bfloat16."""
    return nn.Linear(inputs, outputs, bias, dtype=torch.bfloat16).requires_grad_(trained)
