"""Run a dumped graph on one's own tensors and stop at the first value that is not finite.

A dump (``options={"dump": folder}``) holds each graph as a Python module with a class ``Graph`` and a function
``inputs()``. Its code is run as it is, so replay what you have dumped yourself.
"""

from __future__ import annotations

import importlib.util
import inspect
import linecache
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from quartet.kernels.files import expanded
from quartet.nearest import did_you_mean
from quartet.runtime.compat import TorchDispatchMode

_NAMED = re.compile(r"^ +random\(.*# (\w+)  (\S+)$", re.MULTILINE)  # of inputs(): input and parameter
_ON_GPU = re.compile(r"""['"](cuda(?::\d+)?)['"]""")
_UNSET = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty_strided")


@dataclass(frozen=True)
class Bad:
    """The first value of a graph that is not finite.

    Args:
        what: ``"NaN"``, ``"infinite"`` or both. count, of: so many of its elements.
        where: the operator, or the input. line, text: of the dumped module; 0 and empty of an input.
    """

    what: str
    count: int
    of: int
    where: str
    line: int = 0
    text: str = ""

    def __str__(self) -> str:
        said = f"{self.count} of {self.of} elements are {self.what}"
        place = f"line {self.line}, {self.where}" if self.line else f"input {self.where}"
        return f"{place}: {said}" + (f"\n    {self.text}" if self.line else "")


@dataclass(frozen=True)
class Replay:
    """What a graph computed.

    Args:
        path: of its module. results: what it returned, None where it was stopped. bad: the value by which the first
            NaN, or an infinite result, came up; None where all results are finite.
    """

    path: Path
    results: Any
    bad: Bad | None

    def __str__(self) -> str:
        return f"{self.path}: {'all results are finite' if self.bad is None else self.bad}"


class ReplayError(ValueError):
    """No such graph, or inputs that are not its own; the message says what it takes."""


def replay(dump: str | os.PathLike[str], inputs: Sequence[Any] | Mapping[str, Any] | None = None) -> Replay:
    """Run a dumped graph up to the first NaN, and tell where it comes from, or an infinity among the results.

    Infinities that vanish again, as ``exp`` has them in a sigmoid, and those that the code writes down itself, as in an
    attention mask, are meant to be there.

    Args:
        dump: a module of a dump, or the folder of one graph, of which the graph after its last pass is run.
        inputs: its inputs in order, or some of them by name, parameters by theirs in the model:
            ``{**dict(model.named_parameters()), "primals_3": x}``; the others are random, and parameters that the
            graph does not have are left out. None: all random.

    Raises:
        ReplayError: no graph there, one of a GPU where there is none, or inputs of another number, name, shape or
            dtype.
    """
    try:
        path = _module_path(expanded(dump))
    except FileNotFoundError as error:
        raise ReplayError(error.strerror) from None
    _check_devices(path)
    module = _loaded(path)
    graph = module.Graph()
    names = list(inspect.signature(graph.forward).parameters)
    if isinstance(inputs, Mapping):
        parameters = {parameter: name for name, parameter in _NAMED.findall(path.read_text(encoding="utf-8"))}
        inputs = {parameters.get(name.replace("_orig_mod.", ""), name): value for name, value in inputs.items()}
        inputs = {name: value for name, value in inputs.items()
                  if name in names or not isinstance(value, nn.Parameter)}
    given = _given(names, list(module.inputs()), inputs)
    for name, value in given.items():
        if isinstance(value, Tensor) and (bad := _bad(value, name)) is not None:
            return Replay(path, None, bad)
    watch = _Watch(str(path))
    try:
        with torch.no_grad(), watch:
            results = graph(*given.values())
        return Replay(path, results, watch.source_of(results))
    except _Stop:
        return Replay(path, None, watch.bad)


def _module_path(dump: Path) -> Path:
    if dump.is_file():
        return dump
    if not dump.is_dir():
        raise ReplayError(f"no file or folder {dump}")
    found = sorted((path for path in dump.glob("*.py") if path.name[0].isdigit()),
                   key=lambda path: (path.name.partition("_")[0], ".after" in path.name))
    if found:
        return found[-1]
    graphs = sorted(path.parent.name for path in dump.glob("*/*.py"))
    named = f"; name one of {', '.join(dict.fromkeys(graphs))}" if graphs else ""
    raise ReplayError(f"{dump} holds no graph{named}")


def _check_devices(path: Path) -> None:
    """Raise for a graph of a GPU where there is none."""
    if not torch.cuda.is_available() and (device := _ON_GPU.search(path.read_text(encoding="utf-8"))):
        raise ReplayError(f"{path} is a graph for {device[1]}, and PyTorch sees no GPU here")


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quartet_replay_{path.stem.replace('.', '_')}", path)
    if spec is None or spec.loader is None:
        raise ReplayError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ReplayError(f"{path} does not run as a module of a dump: {type(error).__name__}: {error}") from error
    if not (hasattr(module, "Graph") and hasattr(module, "inputs")):
        raise ReplayError(f"{path} is no graph of a dump: it has no class Graph and no function inputs()")
    return module


def _given(names: list[str], random: list[Any], inputs: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Any]:
    """Input by name, checked against the random ones of the module."""
    held = dict(zip(names, random, strict=True))
    if inputs is None:
        return held
    if not isinstance(inputs, Mapping):
        if not isinstance(inputs, list | tuple):
            raise ReplayError(f"inputs are a list of all in order, or a dict of some by name, not {_kind(inputs)}")
        if len(inputs) != len(names):
            raise ReplayError(f"the graph takes {len(names)} inputs, not {len(inputs)}: {', '.join(names)}")
        inputs = dict(zip(names, inputs, strict=True))
    for name, value in inputs.items():
        if name not in held:
            raise ReplayError(f"no input {name!r}; {did_you_mean(name, names)}possible: {', '.join(names)}")
        wanted = held[name]
        if isinstance(wanted, Tensor):
            same = isinstance(value, Tensor) and (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
            if not same:
                raise ReplayError(f"input {name!r} is {_kind(wanted)}, not {_kind(value)}")
            value = value.detach().to(wanted.device)
        held[name] = value
    return held


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class _Stop(Exception):
    """The first bad value has been found."""


class _Watch(TorchDispatchMode):
    """Looks at the results of every operator that a module calls."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._made: dict[int, Bad | None] = {}  # id of a tensor with infinities → where they come from; None: meant
        self.bad: Bad | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().replace("::", ".")
        before = [(value, *_states(value)) for value in _values((args, kwargs))]
        out = func(*args, **kwargs)
        if name.partition(".default")[0] in _UNSET:
            return out
        sources = [self._made.get(id(value)) for value, _, infinite in before if infinite]
        source = next(filter(None, sources), None)
        for value in _values(out):
            nan, infinite = _states(value)
            if nan and not any(was_nan for _, was_nan, _ in before):
                self.bad = source or self._here(value, name)
                raise _Stop
            if infinite:
                self._made[id(value)] = source if sources else self._here(value, name)
        return out

    def source_of(self, results: Any) -> Bad | None:
        """Where the first infinity among some results comes from."""
        return next(filter(None, (self._made.get(id(value)) for value in _values(results) if _states(value)[1])), None)

    def _here(self, value: Tensor, name: str) -> Bad | None:
        line = _line(sys._getframe(), self._path)
        return _bad(value, name, line, linecache.getline(self._path, line).split("  #")[0].strip())


def _values(tree: Any) -> Iterator[Any]:
    """Tensors and numbers in arguments."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for each in tree:
            yield from _values(each)
    elif isinstance(tree, (Tensor, float)):
        yield tree


def _states(value: Any) -> tuple[bool, bool]:
    """Whether a value has a NaN, and an infinity."""
    if isinstance(value, float):
        return math.isnan(value), math.isinf(value)
    if not value.dtype.is_floating_point or not value.numel():
        return False, False
    wide = value.float() if value.dtype.itemsize == 1 else value
    return bool(wide.isnan().any()), bool(wide.isinf().any())


def _bad(value: Tensor, where: str, line: int = 0, text: str = "") -> Bad | None:
    nan, infinite = _states(value)
    if not (nan or infinite):
        return None
    wide = value.float() if value.dtype.itemsize == 1 else value
    what = " or ".join(word for word, there in (("NaN", nan), ("infinite", infinite)) if there)
    return Bad(what, int((~wide.isfinite()).sum()), value.numel(), where, line, text)


def _line(frame: FrameType | None, path: str) -> int:
    """The line of the module that is running."""
    while frame is not None and frame.f_code.co_filename != path:
        frame = frame.f_back
    return 0 if frame is None else frame.f_lineno
