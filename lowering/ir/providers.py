"""Which provider of an op runs: what a graph calls, what a user may disable, what reports list."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from quartet.lowering.ir.op import REFERENCE, Op, everywhere, op_of, ops
from quartet.runtime.devices import Target

log = logging.getLogger("quartet")


class NoProvider(AssertionError):
    """A lowered graph calls an op that nothing computes on its device."""


def names() -> tuple[str, ...]:
    """What ``disable_kernels`` takes besides families of kernels: ``"cuda_quantize.triton"``, not references."""
    return tuple(f"{op.name}.{provider.name}" for op in ops() for provider in op.providers
                 if provider.name != REFERENCE)


def listing(target: Target) -> list[tuple[str, str, str | None]]:
    """(op, provider, None or why not) of the ops that have a provider for this type of device, the preferred first."""
    return [(op.name, provider.name, target.missing or provider.declines(target))
            for op in ops() if any(provider.device == target.type for provider in op.providers)
            for provider in op.providers if provider.device in (None, target.type)]


def answers(target: Target, at_once: bool = False) -> str:
    """What providers say that take some devices of their type only, for the key of graphs that :func:`settle` made.

    ``at_once``: as they foresee it. That is enough where none is disabled and inexact ones may run: a graph calls an op
    whose preferred provider is still built, and which one runs is seen when it does.
    """
    return " ".join(f"{op.name}.{provider.name}={'01'[provider.declines(target, at_once) is None]}"
                    for op in ops() for provider in op.providers if provider.supports is not everywhere)


def stand_ins(graph: Graph, target_of: Callable[[torch.device], Target],
              disabled: Collection[str] = (), exact: bool = False) -> Iterator[str]:
    """A line for each node that another provider than the preferred one computes: op, provider, and why."""
    for node in graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None and node.target is not op.overload:
            _, reasons = op.choose(target_of(device_of(node)), disabled, exact)
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            yield f"{op.name} runs as {node.target}: {why}"


def settle(graph: Graph, target_of: Callable[[torch.device], Target], disabled: Collection[str] = (),
           exact: bool = False) -> None:
    """Have every op of a graph call its first provider that supports its device and is not disabled.

    Nodes that call the preferred one stay as they are. ``exact``: only providers that give the reference's bits.

    Raises:
        NoProvider: there is none; the message names the node, and why each declines.
    """
    for node in graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is not None and node.target is op.overload:
            _settle(node, op, target_of(device_of(node)), disabled, exact)


def _settle(node: Node, op: Op, target: Target, disabled: Collection[str], exact: bool) -> None:
    provider, reasons = op.choose(target, disabled, exact)
    if provider is None:
        raise NoProvider(f"node {node.format_node()}: nothing computes op {op.name!r} on {target}: "
                         + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    if provider != op.choose(target)[0]:
        node.target = op.overload_of(provider)
        log.info("%s runs %s of %s: %s", node.name, provider.name, op.name,
                 "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def device_of(node: Node) -> torch.device:
    """That of the tensors that a node gives, or reads where it gives none."""
    for value in (of.meta.get("val") for of in (node, *node.all_input_nodes)):
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor):
                return tensor.device
    raise NoProvider(f"node {node.format_node()} gives and reads no tensor: it is on no device")
