"""How the package is built, in numbers that a restructuring should lower; read from the source, nothing is imported.

    python benchmarks/structure.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("quartet", "passes", "lowering", "kernels", "runtime")
IR = "lowering/ir"  # may read the arguments of our own ops
TARGETS = "lowering/targets"
MOST_CIRCLES = 1000


@dataclass(frozen=True)
class Source:
    """One file of the package; ``name`` is its path from the root, ``lowering/ir/ops/core.py``."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    @property
    def room(self) -> str:
        return self.name.partition("/")[0]

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def module(self) -> str:
        """The dotted name under which it is imported."""
        parts = self.name.removesuffix(".py").removesuffix("/__init__").split("/")
        return ".".join(parts if parts[0] == "quartet" else ["quartet", *parts])

    def count(self, wanted: Callable[[ast.AST], bool]) -> int:
        return sum(map(wanted, ast.walk(self.tree)))


def sources(root: Path = ROOT) -> list[Source]:
    """Every Python file of the rooms, once: links from one room into another are not followed."""
    found = {path.resolve() for room in ROOMS for path in (root / room).rglob("*.py")}
    return [Source(path.relative_to(root.resolve()).as_posix(), path.read_text(encoding="utf-8"))
            for path in sorted(found)]


def reads_arguments(node: ast.AST) -> bool:
    """``….args[…]``, read."""
    return (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Attribute) and node.value.attr == "args")


def defines_op(node: ast.AST) -> bool:
    """``library.define(…)``."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("library.define")


def is_kernel(node: ast.AST) -> bool:
    """A function under ``@triton.jit``."""
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    return len((*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs))


def imports(statements: Iterable[ast.AST], known: set[str]) -> Iterator[str]:
    """The package's own modules that import statements name."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in known else node.module for name in inner} & known


def import_graph(files: list[Source], whole: bool) -> networkx.DiGraph:
    """An edge for each import between two modules; ``whole``: those inside of functions too."""
    known = {file.module for file in files}
    graph = networkx.DiGraph()
    for file in files:
        statements = ast.walk(file.tree) if whole else file.tree.body
        graph.add_edges_from((file.module, name) for name in imports(statements, known) if name != file.module)
    return graph


def circles(graph: networkx.DiGraph) -> str:
    """How many there are, counted to ``MOST_CIRCLES``, and the shortest of them."""
    found = list(islice(networkx.simple_cycles(graph), MOST_CIRCLES))
    if not found:
        return "0"
    shortest = min(found, key=lambda circle: (len(circle), sorted(circle)))
    start = shortest.index(min(shortest))
    around = [*shortest[start:], *shortest[:start + 1]]
    return f"{len(found)}{' or more' if len(found) == MOST_CIRCLES else ''}: {' → '.join(around)}"


def sideways(files: list[Source]) -> str:
    """Imports from one target's folder into another's; what lies beside the folders is everybody's."""
    folders = {file.module: file.folder for file in files if file.folder.startswith(f"{TARGETS}/")}
    if not folders:
        return "no lowering/targets"
    pairs = [(a, b) for a, b in import_graph(files, whole=True).edges
             if a in folders and folders.get(b, folders[a]) != folders[a]]
    return f"{len(pairs)}{': ' if pairs else ''}{', '.join(f'{a} → {b}' for a, b in sorted(pairs)[:3])}"


def fullest(files: list[Source], room: str) -> str:
    """The folder of a room with most files beside ``__init__.py``."""
    counts = Counter(f.folder for f in files if f.room == room and not f.name.endswith("/__init__.py"))
    return "{1} in {0}/".format(*max(counts.items(), key=lambda item: item[1])) if counts else "0"


def twice(files: list[Source]) -> str:
    places = defaultdict(list)
    for file in files:
        places[file.name.rpartition("/")[2]].append(file.folder)
    again = sorted(name for name, folders in places.items() if len(folders) > 1 and not name.startswith("__"))
    return f"{len(again)}{': ' if again else ''}{', '.join(again)}"


def longest(files: list[Source]) -> str:
    """The Triton kernel with most parameters."""
    kernels = [(parameters(node), f"{node.name} in {file.name}") for file in files for node in ast.walk(file.tree)
               if isinstance(node, ast.FunctionDef) and is_kernel(node)]
    return "{} of {}".format(*max(kernels)) if kernels else "no kernels"


def measures(files: list[Source]) -> list[tuple[str, str]]:
    """(what, how much) of each measure."""
    passes, lowering = ([f for f in files if f.room == room] for room in ("passes", "lowering"))
    ir = [f for f in lowering if f.name.startswith(IR)]
    outside = [f for f in (*passes, *lowering) if f not in ir]

    def total(where: list[Source], wanted: Callable[[ast.AST], bool]) -> str:
        return str(sum(f.count(wanted) for f in where))

    ignores = sum(len(re.findall(r"# type: ignore", f.text)) for f in (*passes, *lowering))
    return [
        (".args[…] read in passes", total(passes, reads_arguments)),
        (".args[…] read in lowering", total(lowering, reads_arguments)),
        (f".args[…] read in both, outside {IR}", total(outside, reads_arguments)),
        ("assert in passes", total(passes, lambda node: isinstance(node, ast.Assert))),
        ("type: ignore in passes and lowering", str(ignores)),
        ("library.define", total(files, defines_op)),
        *((f"most files in a folder of {room}", fullest(files, room)) for room in ROOMS),
        ("file names that occur twice", twice(files)),
        ("most parameters of a Triton kernel", longest(files)),
        ("import circles", circles(import_graph(files, whole=False))),
        ("import circles, functions included", circles(import_graph(files, whole=True))),
        ("imports between targets", sideways(files)),
        ("files", str(len(files))),
        ("lines", str(sum(len(f.text.splitlines()) for f in files))),
        ("longest file", "{} lines, {}".format(*max((len(f.text.splitlines()), f.name) for f in files))),
    ]


def main() -> int:
    rows = measures(sources())
    width = max(len(what) for what, _ in rows)
    print("\n".join(f"{what.ljust(width)}  {value}" for what, value in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
