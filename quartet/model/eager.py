"""Products that a model computes outside of all graphs: which, where, and why no graph holds them.

The model runs once more without being compiled, and every product is looked at as it is dispatched. Those of layers of
which a graph has a record are left out; the rest gets records like those of a graph, with the place of the call and the
graph break that it comes after.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from quartet.kernels.spec import dtype_name
from quartet.lowering.recipe.records import MatmulRecord
from quartet.model.flat import own_parameters
from quartet.passes.naming import module_name
from quartet.policy import Policy
from quartet.runtime.breaks import Break
from quartet.runtime.compat import TorchDispatchMode, backward_number
from quartet.runtime.frames import calls_module

Place = tuple[str, int, int]  # file, line, first line of the function
TORCH = str(Path(torch.__file__).parent)
RECURRENT = ("rnn", "lstm", "gru", "_transformer_encoder_layer_fwd", "_native_multi_head_attention")


@dataclass(frozen=True)
class Seen:
    """A product ``[m, k] · [k, n]`` that was dispatched.

    Attributes:
        weight: name of the parameter that it reads; empty where both operands are activations.
        module: name of the innermost module that computes it. dtype: of its result.
        roles: the products that training runs for it. places: where it is called, the innermost place first.
    """

    op_class: str
    weight: str
    module: str
    m: int
    n: int
    k: int
    batch: int
    dtype: str
    roles: tuple[str, ...]
    places: tuple[Place, ...]

    @property
    def fqn(self) -> str:
        """The name of its row."""
        return module_name(self.weight) if self.weight else self.module


class Products(TorchDispatchMode):
    """Counts the products of forward that are dispatched meanwhile.

    Args:
        roots: the modules whose parameters and submodules are named.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        super().__init__()
        self.found: Counter[Seen] = Counter()
        self._modules: dict[int, str] = {}
        self._weights: dict[int, str] = {}  # address of a storage → name of the parameter
        self._casts: list[Tensor] = []  # keeps the addresses of what was made of parameters
        for root in roots:
            for path, module in nn.Module.named_modules(root):
                self._modules.setdefault(id(module), path)
                for name, parameter in own_parameters(module).items():
                    self._weights.setdefault(_address(parameter), f"{path}.{name}" if path else name)
        self._weights.pop(0, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if backward_number() is None:
            name = str(func.overloadpacket).removeprefix("aten.")
            if name == "_to_copy" and (weight := self._name(args[0])):
                self._casts.append(out)
                self._weights[_address(out)] = weight
            for op_class, x, w, m, n, k, batch in _products(name, args, out, self._name):
                self._note(op_class, x, w, (m, n, k, batch), out)
        return out

    def _name(self, value: Any) -> str:
        return self._weights.get(_address(value), "") if isinstance(value, Tensor) else ""

    def _note(self, op_class: str, x: Any, w: Any, sizes: tuple[int, int, int, int], out: Any) -> None:
        training = torch.is_grad_enabled()
        roles = ("fprop", *(role for role, of in (("dgrad", x), ("wgrad", w)) if training and of.requires_grad))
        module, places = self._around(sys._getframe(2))
        first = next(value for value in _tensors([out]))
        self.found[Seen(op_class, self._name(w), module, *sizes, dtype_name(first.dtype), roles, places)] += 1

    def _around(self, frame: FrameType | None) -> tuple[str, tuple[Place, ...]]:
        """The innermost module that is called, and the calls of what is not torch's. Only frames of torch are looked
        into: reading the variables of a user's frame would keep them alive."""
        module, places = None, []
        while frame is not None:
            code = frame.f_code
            if module is None and calls_module(frame):
                module = self._modules.get(id(frame.f_locals.get("self")))
            if not code.co_filename.startswith(TORCH):
                places.append((code.co_filename, frame.f_lineno, code.co_firstlineno))
            frame = frame.f_back
        return module or "", tuple(places)


def _address(value: Tensor) -> int:
    """Of a tensor's storage; 0 where it has none of its own."""
    with suppress(Exception):  # of subclasses, which hold other tensors
        return value.untyped_storage().data_ptr()
    return 0


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


Product = tuple[str, Any, Any, int, int, int, int]  # op class, X, W, m, n, k, batch


def _products(op: str, args: Sequence[Any], out: Any, name: Callable[[Any], str]) -> Iterator[Product]:
    """The products in one call of an operator of aten."""
    if op in ("mm", "addmm", "mv", "addmv", "_scaled_mm"):
        a, b = args[1:3] if op.startswith("add") else args[:2]
        b_columns = b.shape[1] if b.dim() > 1 else 1
        if name(a) and not name(b):
            yield "linear", b, a, b_columns, a.shape[0], a.shape[1], 1
        else:
            yield "linear" if name(b) else "bmm", a, b, a.shape[0], b_columns, a.shape[1], 1
    elif op in ("bmm", "baddbmm", "_grouped_mm"):
        a, b = args[1:3] if op.startswith("badd") else args[:2]
        batch = a.shape[0] if a.dim() == 3 else 1
        yield "grouped" if name(b) else "bmm", a, b, a.shape[-2], b.shape[-1], a.shape[-1], batch
    elif "convolution" in op and len(args) > 6:
        x, w, transposed = args[0], args[1], bool(args[6])
        pixels = x.numel() // x.shape[1] if transposed else out.numel() // out.shape[1]
        n, k = (w.numel() // w.shape[0], w.shape[0]) if transposed else (w.shape[0], w.numel() // w.shape[0])
        yield "conv", x, w, pixels, n, k, 1
    elif op == "_trilinear":
        x, w = args[0], args[1]
        yield "linear", x, w, out.shape[0], out.shape[-1], w.numel() // out.shape[-1], 1
    elif op in ("embedding", "_embedding_bag"):
        yield "embedding", args[0], args[0], args[1].numel(), args[0].shape[1], args[0].shape[0], 1
    elif op.startswith("_scaled_dot_product_"):
        q, k, v = args[:3]
        *batch, length, width = q.shape
        yield "attention_qk", q, k, length, k.shape[-2], width, prod(batch)
        yield "attention_pv", q, v, length, v.shape[-1], v.shape[-2], prod(batch)
    elif any(word in op for word in RECURRENT):
        x = next(_tensors(args))
        for w in _tensors(args):
            if w.dim() == 2 and name(w):
                yield "linear", x, w, x.numel() // x.shape[-1], w.shape[0], w.shape[1], 1


def records_of(seen: Mapping[Seen, int], records: Sequence[MatmulRecord], breaks: Sequence[Break],
               policy: Policy) -> list[MatmulRecord]:
    """A record for each product and role that no graph has one of.

    Args:
        seen: products → how often they were dispatched. records: those of the graphs.
        breaks: where dynamo has ended graphs. policy: which recipe the products were to get.
    """
    known, first = {r.fqn for r in records}, 1 + max((r.site for r in records), default=-1)
    merged: dict[Seen, int] = Counter()
    for one, count in seen.items():
        if one.fqn not in known:
            merged[one] += count
    made = []
    for site, (one, count) in enumerate(merged.items(), first):
        resolution = policy.resolve(one.op_class, one.fqn, one.m, one.n, one.k)
        sizes = {"fprop": (one.m, one.n, one.k), "dgrad": (one.m, one.k, one.n), "wgrad": (one.n, one.k, one.m)}
        for role in one.roles if one.op_class != "embedding" else ("fprop",):
            recipe, (m, n, k) = resolution.recipe_for(role), sizes[role]
            made.append(MatmulRecord(
                site=site, fqn=one.fqn, op_class=one.op_class, role=role, m=m, n=n, k=k, dtype=one.dtype,
                recipe=None if recipe is None else recipe.name, batch=one.batch * count,
                reason=why(one.places, breaks)))
    return made


def why(places: Sequence[Place], breaks: Sequence[Break]) -> str:
    """Why a product is in no graph, by where it is called."""
    calls = {(file, line) for file, line, _ in places}
    functions = {(file, first) for file, _, first in places}
    for one in breaks:  # the call that ended a graph, or a function that no graph was made of
        if one.function in functions or any(place in calls for place in one.places):
            at = next((place for place in one.places if not place[0].startswith(TORCH)), one.places[0])
            what = "graph break" if one.function is None else "torch.compile leaves the function to Python for a break"
            return f"runs in eager, in no graph: {what} at {_short(*at)}: {one.why}"
    here = next(iter(places), None)
    return f"runs in eager, in no graph{'' if here is None else f': called at {_short(*here[:2])}'}"


def _short(file: str, line: int) -> str:
    """A place as a reader of this folder finds it."""
    inside = file.startswith(os.getcwd() + os.sep)
    return f"{os.path.relpath(file) if inside else file}:{line}"


def wanted(records: Iterable[MatmulRecord], policy: Policy) -> list[MatmulRecord]:
    """Those that the policy quantises: all of what its default names, unless it weighs the price of each, and what
    rules name."""
    found = []
    for r in records:
        choice = policy.resolve(r.op_class, r.fqn, r.m, r.n, r.k).choice(r.role)
        if choice.gemm is not None and (choice.rule is not None or not policy.where_it_pays):
            found.append(r)
    return found
