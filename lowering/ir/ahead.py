"""The kernels of our ops are compiled on threads of their own, while Inductor generates code.

Otherwise each is compiled when the model's thread first launches it, one after the other: half a dozen seconds of the
first step. What a launch depends on stands in the graph. So each op that a graph calls is run once for tensors without
memory, and what it would launch is compiled and loaded. Triton lets other threads run for three quarters of that time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, map_arg
from torch.fx.node import map_aggregate

from quartet.kernels.launcher import compiling_only
from quartet.lowering.ir.graph import arguments
from quartet.lowering.ir.op import op_of
from quartet.lowering.ir.providers import device_of
from quartet.lowering.ir.values import Layout, described, undescribed
from quartet.runtime.devices import Target

THREADS = 2
_DRAWS = ("site", "t_site")  # arguments that number random draws: launches differ by them as by any integer
log = logging.getLogger("quartet")

Run = Callable[..., Any]
Call = tuple[Run, dict[str, Any]]


class Absent(Tensor):
    """A tensor of a GPU that has no memory, whose address is as aligned as can be. What is made of it is absent too."""

    layout_only: Tensor

    @staticmethod
    def __new__(cls, layout_only: Tensor, device: torch.device) -> Absent:
        made = Tensor._make_wrapper_subclass(cls, layout_only.shape, strides=layout_only.stride(),
                                             dtype=layout_only.dtype, device=device)
        made.layout_only = layout_only
        return made

    __torch_function__ = torch.nn.Parameter.__torch_function__  # nothing above autograd

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Absent({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def data_ptr(self) -> int:
        return 0

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        devices: list[torch.device] = []

        def on_meta(value: Any) -> Any:
            if isinstance(value, Absent):
                devices.append(value.device)
                return value.layout_only
            return value

        def absent(value: Any) -> Any:
            return Absent(value, devices[0]) if isinstance(value, Tensor) else value

        args, kwargs = map_aggregate((args, kwargs or {}), on_meta)
        return map_aggregate(func(*args, **kwargs), absent)


def compile_ahead(graph: Graph) -> list[threading.Thread]:
    """Begin to compile what the ops of a lowered graph launch on GPUs; returns the threads that do.

    What cannot be compiled so is compiled when it is first launched, as everything is without this.
    """
    calls = deque(_calls(graph))
    threads = [threading.Thread(target=_compile, args=(calls,), name=f"quartet-kernels-{i}")
               for i in range(min(THREADS, len(calls)))]
    for thread in threads:
        thread.start()
    return threads


def _calls(graph: Graph) -> list[Call]:
    """One call of each kind in a graph, in its order: what compiles the kernels, and the arguments as layouts."""
    found: dict[Hashable, Call] = {}
    chosen: dict[tuple[Any, torch.device], Run | None] = {}
    for node in graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        device = None if op is None else device_of(node)
        if op is None or device is None or device.type != "cuda":
            continue
        if (node.target, device) not in chosen:
            chosen[node.target, device] = op.ahead(node.target, Target.of(device))
        run = chosen[node.target, device]
        given = {name: described(_values(value)) for name, value in arguments(node).items() if name != op.owner}
        if run is None or None in given.values():
            continue
        kind = tuple(_specialized(value) if name in _DRAWS else value for name, value in given.items())
        found.setdefault((run, kind), (run, given))
    return list(found.values())


def _values(argument: Any) -> Any:
    return map_arg(argument, lambda node: node.meta.get("val"))


def _specialized(described: Any) -> Any:
    """What of an integer a kernel is compiled for."""
    _, number = described
    return number == 1, number % 16 == 0


def _compile(calls: deque[Call]) -> None:
    """Compile for the calls that are left, until there are none or the program ends."""
    with compiling_only(), torch.no_grad():
        while calls and threading.main_thread().is_alive():
            try:
                run, given = calls.popleft()
            except IndexError:  # another thread took the last
                return
            try:
                run(**{name: undescribed(value, _absent) for name, value in given.items()})
            except Exception as error:  # the model's own launch meets it where it can be told
                log.debug("kernels of %s were not compiled ahead: %s", run.__name__, error)


def _absent(layout: Layout) -> Absent:
    return Absent(torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device="meta"), layout.device)
