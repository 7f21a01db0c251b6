"""The passes, in order, and the one graph pass that Inductor calls with the joint graph."""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph

from quartet.kernels import extension
from quartet.kernels.extension import ExtensionError
from quartet.kernels.spec import dtype_name
from quartet.lowering import registry
from quartet.lowering.ir.ahead import compile_ahead
from quartet.lowering.ir.graph import is_backward
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import ROLES
from quartet.passes.collectives.gathered import gathered
from quartet.passes.collectives.travel import travel
from quartet.passes.compilation import Compilation
from quartet.passes.find.canonicalize import canonicalize
from quartet.passes.find.find_grouped import find_grouped
from quartet.passes.find.find_matmuls import find_matmuls
from quartet.passes.find.tag import tag
from quartet.passes.find.unfold import unfold
from quartet.passes.graph_pass import GraphPass, in_order
from quartet.passes.inspect.check import check
from quartet.passes.inspect.observe import observe
from quartet.passes.lower import lower
from quartet.passes.naming import name_modules
from quartet.passes.plan.plan import plan
from quartet.passes.quantize.delayed import delayed
from quartet.passes.quantize.draw import draw
from quartet.passes.quantize.quantize import quantize
from quartet.passes.quantize.rotate import rotate
from quartet.passes.quantize.share import share
from quartet.passes.quantize.stay_padded import stay_padded
from quartet.passes.quantize.sum_first import sum_first
from quartet.passes.recipe.embed import embed
from quartet.passes.recipe.estimator import estimator
from quartet.passes.recipe.outliers import outliers
from quartet.passes.recipe.q_ema import toward
from quartet.passes.recipe.smooth_swiglu import smooth_swiglu
from quartet.passes.residuals.choose import begin
from quartet.passes.residuals.save import save
from quartet.passes.residuals.unchanged import unchanged
from quartet.passes.sites import Decided, Decision, Planned, Quantized
from quartet.passes.stage import Stage, pass_of
from quartet.passes.state import State
from quartet.passes.verify import Rules
from quartet.runtime.compat import CustomGraphPass

log = logging.getLogger("quartet")

Signature = tuple[str, ...]
PASSES = in_order(
    tag, canonicalize, unfold, find_matmuls, find_grouped, embed, plan, unchanged, smooth_swiglu, outliers,
    estimator, toward, rotate, quantize, gathered, delayed, share, travel, stay_padded,
    sum_first, draw, observe, check, save, lower,
)
NAMES = tuple(p.name for p in PASSES)
OPTIONAL = tuple(p.name for p in PASSES if p.optional)
_KIND = "pass"
_registered: dict[str, tuple[Callable[[Stage], Any], str]] = {}  # name → function, the pass that it comes after


def register(function: Callable[[Stage], Any], after: str = "quantize") -> Callable[[Stage], Any]:
    """Run a function of one's own on every graph, after a pass, and return it; the same again changes nothing.

    It is called what the function is, may be named by ``disable_passes`` and shows in dumps. Of several after one pass,
    the first registered is the first to run. A graph in which nothing is planned goes no further than ``plan``.

    Args:
        function: gets a :class:`quartet.extend.Stage`.
        after: name of a pass, such as ``"plan"``, ``"rotate"``, ``"quantize"`` or ``"lower"``.

    Raises:
        ExtensionError: a name that is taken, or no pass called ``after``.
    """
    name = getattr(function, "__name__", "")
    if _registered.get(name) == (function, after):
        return function
    extension.check_name(_KIND, name, NAMES)
    if after not in NAMES:
        near = get_close_matches(after, NAMES, n=1)
        raise ExtensionError(f"pass {name!r}: no pass {after!r} to come after; "
                             f"{f'did you mean {near[0]!r}? ' if near else ''}possible: {', '.join(NAMES)}")
    at = NAMES.index(after) + 1
    while at < len(NAMES) and NAMES[at] in _registered:
        at += 1
    _registered[name] = function, after
    _set(*PASSES[:at], pass_of(function), *PASSES[at:])
    extension.add(_KIND, name, (after, NAMES.index(name)), function)
    return function


def unregister(name: str) -> None:
    """Forget a registered pass. Raises ExtensionError where there is none of that name."""
    extension.remove(_KIND, name)
    del _registered[name]
    _set(*(one for one in PASSES if one.name != name))


def _set(*passes: GraphPass) -> None:
    global PASSES, NAMES, OPTIONAL
    PASSES = passes
    NAMES, OPTIONAL = tuple(p.name for p in passes), tuple(p.name for p in passes if p.optional)


def signature(values: Iterable[Any]) -> Signature:
    """Shape and dtype of each input of a graph, as text."""
    return tuple(f"{tuple(v.shape)} {v.dtype}" if isinstance(v, torch.Tensor) else str(v) for v in values)


@contextmanager
def without_collections() -> Iterator[None]:
    """Python looks for no cycles to free. Passes leave next to none, and make so many nodes that it would look at all
    that lives, again and again: some 0.3 s each time."""
    collects = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if collects:
            gc.enable()


class Pipeline(CustomGraphPass):
    """Runs ``PASSES`` over a joint (or inference) graph, in place.

    Args:
        config: what the compilation is to be.
        earlier: the user's own passes, run first.
        ahead: begin to compile the kernels of a graph as soon as it is lowered.
    """

    def __init__(self, config: Compilation, earlier: tuple = (), ahead: bool = False) -> None:
        self.config, self.earlier, self.ahead = config, earlier, ahead
        self.records: list[MatmulRecord] = []
        self._bodies: set[Signature] = set()  # joint graphs of regions; what comes after them are their parts

    @without_collections()
    def __call__(self, graph: Graph) -> None:
        for other in self.earlier:
            other(graph)
        gm = graph.owning_module
        if gm is None:
            gm = torch.fx.GraphModule(torch.nn.Module(), graph)
        config = self._config_of(graph)
        if config is not None:
            self.records += run(gm, config)
            if self.ahead:
                compile_ahead(graph)

    def _config_of(self, graph: Graph) -> Compilation | None:
        """The compilation of this graph; None for a piece of a region whose joint graph we have had."""
        inputs = graph.find_nodes(op="placeholder")
        if any("desc" in node.meta for node in inputs):
            return self.config
        primals = [node for node in inputs if not node.name.startswith("tangents")]
        body = signature(node.meta.get("val") for node in primals)
        if body in self.config.regions and len(primals) < len(inputs):
            self._bodies.add(body)
        elif self._bodies:
            return None
        return replace(self.config, weights=self.config.regions.get(body, {}), anchor=None, token=None, memory=None)

    def uuid(self) -> str | None:
        """Cache key: source of the package and of what is registered, the compilation, the earlier passes' own keys.

        None, which keeps the graph out of the caches, when somebody observes the passes, or an earlier one or something
        registered has no key.
        """
        if not all(getattr(observer, "cached", False) for observer in self.config.observers):
            return None
        others: list[Any] = [extension.digest(), *(getattr(p, "uuid", lambda: None)() for p in self.earlier)]
        if None in others:
            return None
        return hashlib.sha256(repr((source_digest(), self.config.key(), others)).encode()).hexdigest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Hash of every source file that shapes a graph or computes its numbers."""
    import quartet.kernels
    import quartet.lowering
    import quartet.runtime

    digest = hashlib.sha256()
    rooms = [Path(str(m.__file__)).parent for m in (quartet.kernels, quartet.lowering, quartet.runtime)]
    for room in (Path(__file__).parent, *rooms):
        for path in sorted(p for p in room.rglob("*") if p.suffix in (".py", ".cpp", ".in")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def run(gm: torch.fx.GraphModule, config: Compilation) -> list[MatmulRecord]:
    """All enabled passes over one graph; returns a record for every matmul and role."""
    trains = any(is_backward(node) for node in gm.graph.nodes)
    if not trains:
        config = config.evaluating()
    state = State(gm, config)
    rules = Rules(state)
    if trains and config.memory is not None:
        begin(state)
    name_modules(gm.graph, config.modules)
    planned, told = True, log.isEnabledFor(logging.DEBUG)
    for index, step in enumerate(p for p in PASSES if p.name not in config.disable_passes):
        if not (planned or step.unplanned):
            continue
        name = step.name
        for observer in config.observers:
            observer.before(index, name, gm)
        start, counts = time.perf_counter(), _ops(gm) if told else None
        step(state)
        rules.check(name, registered=name in _registered)
        seconds = time.perf_counter() - start
        for observer in config.observers:
            observer.after(index, name, gm, seconds)
        if counts is not None:
            log.debug("%-13s %6.1f ms  %s", name, seconds * 1e3, _difference(counts, _ops(gm)))
        if name == "plan":
            planned = bool(state.at(Planned))
    records = _records(state)
    for record in records:
        if record.kernel is None:
            log.info("%s %s (m=%s n=%s k=%s) left alone: %s", record.fqn or "matmul", record.role, record.m, record.n,
                     record.k, record.reason)
    for observer in config.observers:
        observer.finish(records, gm)
    return records


def _ops(gm: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def _difference(before: Counter[str], after: Counter[str]) -> str:
    changes = {k: after[k] - before[k] for k in sorted(before | after) if after[k] != before[k]}
    return ", ".join(f"{v:+d} {k}" for k, v in changes.items()) or "no change"


def _records(state: State) -> list[MatmulRecord]:
    sites, called = state.at(Decided), state.config.called
    return [*(_record(site, role, called) for site in sites for role in ROLES if role in site.products), *state.alone]


def _multiple(site: Decided, role: str, kernel: registry.Kernel | None) -> int:
    """What the contraction axis of a GEMM is padded to a multiple of; all candidates are powers of two."""
    gemm = site.active(role) if isinstance(site, Planned) else None
    if gemm is None or gemm.specs is None:
        return 1
    rotation = gemm.rotation.n if gemm.rotation is not None else 1
    return max(*(spec.multiple for spec in gemm.specs), rotation, 1 if kernel is None else kernel.align)


def _record(site: Decided, role: str, called: float) -> MatmulRecord:
    m, n, k, batch = (size if isinstance(size, int) else str(size) for size in (*site.dims(role), site.batch or 1))
    kernel = site.kernels.get(role) if isinstance(site, Quantized) else None
    recipe = site.resolution.recipe_for(role)
    saved_bytes = site.saved_bytes if isinstance(site, Quantized) and role == "fprop" else None
    decision = site.decisions[role] if isinstance(site, Planned) else Decision()
    depth, multiple = site.dims(role)[2], _multiple(site, role, decision.kernel)
    notes = site.notes
    if kernel and isinstance(depth, int) and depth % multiple and (site.groups is None or role != "wgrad"):
        notes += (f"k padded to {-(-depth // multiple) * multiple}",)
    if kernel and decision.reason:
        notes += (f"no kernel took it ({decision.reason})",)
    if kernel and role in site.remarks:
        notes += (site.remarks[role],)
    return MatmulRecord(
        site=site.index, fqn=site.fqn, op_class=site.op_class, role=role, m=m, n=n, k=k,
        dtype=dtype_name(site.dtype), recipe=recipe.name if recipe is not None else None, kernel=kernel,
        reason="" if kernel else site.reasons.get(role, "no pass quantised it"),
        saved_bytes=saved_bytes, notes=notes, batch=batch, called=called)
