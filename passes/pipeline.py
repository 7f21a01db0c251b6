"""The passes, in order, and the one graph pass that Inductor calls with the joint graph."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch.fx import Graph

from quartet.lowering.records import MatmulRecord
from quartet.lowering.recipe import ROLES
from quartet.passes.canonicalize import canonicalize
from quartet.passes.find_matmuls import find_matmuls
from quartet.passes.lower import lower
from quartet.passes.plan import plan
from quartet.passes.quantize import quantize
from quartet.passes.rotate import rotate
from quartet.passes.save import save
from quartet.passes.share import share
from quartet.passes.sites import MatmulSite
from quartet.passes.state import Config, State
from quartet.passes.verify import verify
from quartet.runtime.compat import CustomGraphPass

log = logging.getLogger("quartet")

Pass = Callable[[State], None]
PASSES: tuple[Pass, ...] = (canonicalize, find_matmuls, plan, rotate, quantize, share, save, lower)
REQUIRED = ("canonicalize", "find_matmuls", "plan", "quantize", "lower")
NAMES = tuple(p.__name__ for p in PASSES)
OPTIONAL = tuple(n for n in NAMES if n not in ("find_matmuls", "plan", "rotate", "quantize"))


class Pipeline(CustomGraphPass):  # type: ignore[misc, valid-type]
    """Runs ``PASSES`` over a joint (or inference) graph, in place.

    Args:
        config: the resolved configuration.
        key: everything that the result depends on beyond the graph and this package's source, as text.
        earlier: the user's own passes, run first.
    """

    def __init__(self, config: Config, key: str, earlier: tuple = ()) -> None:
        self.config, self.key, self.earlier = config, key, earlier
        self.records: list[MatmulRecord] = []

    def __call__(self, graph: Graph) -> None:
        for other in self.earlier:
            other(graph)
        gm = graph.owning_module
        if gm is None:
            gm = torch.fx.GraphModule(torch.nn.Module(), graph)
        self.records += run(gm, self.config)

    def uuid(self) -> str:
        """Cache key: source of the package, configuration, and the earlier passes' own keys."""
        others = [p.uuid() for p in self.earlier]
        return hashlib.sha256(repr((source_digest(), self.key, others)).encode()).hexdigest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Hash of every source file that shapes a graph or computes its numbers."""
    import quartet.kernels
    import quartet.lowering
    import quartet.runtime

    digest = hashlib.sha256()
    rooms = [Path(m.__file__).parent for m in (quartet.kernels, quartet.lowering, quartet.runtime)]
    for room in (Path(__file__).parent, *rooms):
        for path in sorted(p for p in room.rglob("*") if p.suffix in (".py", ".cpp")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def run(gm: torch.fx.GraphModule, config: Config) -> list[MatmulRecord]:
    """All enabled passes over one graph; returns a record for every matmul and role."""
    state = State(gm, config, device=_device(gm))
    for index, step in enumerate(p for p in PASSES if p.__name__ not in config.disable_passes):
        name = step.__name__
        for observer in config.observers:
            observer.before(index, name, gm)
        start, counts = time.perf_counter(), _ops(gm)
        step(state)
        verify(state, name)
        seconds = time.perf_counter() - start
        for observer in config.observers:
            observer.after(index, name, gm, seconds)
        log.debug("%-13s %6.1f ms  %s", name, seconds * 1e3, _difference(counts, _ops(gm)))
        if name == "plan" and not state.planned():
            break
    records = _records(state)
    for record in records:
        if record.kernel is None:
            log.info("%s %s (m=%s n=%s k=%s) left alone: %s", record.fqn or "matmul", record.role, record.m, record.n,
                     record.k, record.reason)
    for observer in config.observers:
        observer.finish(records, gm)
    return records


def _device(gm: torch.fx.GraphModule) -> torch.device:
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), torch.Tensor):
            return node.meta["val"].device
    return torch.device("cpu")


def _ops(gm: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def _difference(before: Counter[str], after: Counter[str]) -> str:
    changes = {k: after[k] - before[k] for k in sorted(before | after) if after[k] != before[k]}
    return ", ".join(f"{v:+d} {k}" for k, v in changes.items()) or "no change"


def _records(state: State) -> list[MatmulRecord]:
    rows = [_record(state, site, role) for site in state.sites for role in ROLES if role in site.products]
    return rows + state.alone


def _record(state: State, site: MatmulSite, role: str) -> MatmulRecord:
    m, n, k = (size if isinstance(size, int) else str(size) for size in site.dims(role))
    kernel = state.kernels.get((site.index, role))
    recipe = site.resolution.recipe_for(role) if site.resolution is not None else None
    depth = site.dims(role)[2]
    notes = (f"k padded to {-(-depth // 32) * 32}",) if kernel and isinstance(depth, int) and depth % 32 else ()
    return MatmulRecord(
        site=site.index, fqn=site.fqn, op_class=site.op_class, role=role, m=m, n=n, k=k,
        dtype=str(site.dtype).removeprefix("torch."), recipe=recipe.name if recipe is not None else None, kernel=kernel,
        reason="" if kernel else site.reasons.get(role, "no pass quantised it"),
        saved_bytes=site.saved_bytes if role == "fprop" else None, notes=notes)
