"""The structure of the house: imports point down, private PyTorch names stay in one module, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "runtime", "lowering", "passes", "quartet")
SHARES_PRIVATE_NAMES = "runtime/compat.py"
MOST_LINES = 400
MOST_FILES = 12  # of a folder, besides its __init__.py

KNOWS_POSITIONS = "lowering/ir/"  # of arguments in a node
WHOLE_CALLS = {  # files elsewhere that take a call with all its arguments, whatever they are
    "lowering/targets/inductor.py", "passes/quantize/share.py", "passes/find/values.py",
    "passes/residuals/partition.py", "runtime/capture.py",  # what a graph returns
}

SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TARGETS = "lowering/targets/"
PROGRAMS = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "quartet":
        parts.insert(0, "quartet")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that a module imports: statements, relative ones too, and ``import_module("…")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports_of(path: Path) -> list[str]:
    return list(imported(ast.parse(path.read_text(encoding="utf-8")), module_of(path), path.name == "__init__.py"))


def modules_of(path: Path, known: set[str]) -> set[str]:
    """Which of some modules a file imports, or names of."""
    names = {name if name in known else name.rpartition(".")[0] for name in imports_of(path)}
    return names & known - {module_of(path)}


def target_of(path: Path) -> str | None:
    """The folder of ``lowering/targets`` that a file is in."""
    name = name_of(path)
    return name.removeprefix(TARGETS).partition("/")[0] if name.startswith(TARGETS) and name.count("/") > 2 else None


def room_of(module: str) -> str | None:
    """The room that a dotted name lives in; None for a name outside the package."""
    first, *rest = module.split(".")
    if first != "quartet":
        return None
    return rest[0] if rest and rest[0] in ROOMS else "quartet"


def is_private(module: str) -> bool:
    """Whether a dotted name reaches a private part of torch."""
    first, *rest = module.split(".")
    return first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest)


def attribute_chain(node: ast.Attribute) -> str:
    """``a.b.c`` of an attribute access on a plain name, else an empty string."""
    parts = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    return ".".join([value.id, *reversed(parts)]) if isinstance(value, ast.Name) else ""


def test_the_rooms_are_where_this_test_looks():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ROOMS)
    assert "quartet.kernels.spec" in {module_of(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    level = ROOMS.index(path.relative_to(ROOT).parts[0])
    upwards = [name for name in imports_of(path) if (room := room_of(name)) and ROOMS.index(room) > level]
    assert not upwards, f"{name_of(path)} imports {upwards}; a room may import only {', '.join(ROOMS[:level + 1])}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] == "kernels"], ids=name_of)
def test_kernels_know_only_themselves(path):
    assert {room_of(name) for name in imports_of(path)} <= {None, "kernels"}


def test_imports_go_round_in_no_circle():
    """Those inside of functions count too."""
    known = {module_of(path) for path in SOURCES}
    graph = networkx.DiGraph((module_of(path), name) for path in SOURCES for name in modules_of(path, known))
    assert graph.number_of_edges() > len(SOURCES)
    assert next(networkx.simple_cycles(graph), None) is None


@pytest.mark.parametrize("path", [p for p in SOURCES if target_of(p)], ids=name_of)
def test_targets_do_not_import_each_other(path):
    """What several need lies beside their folders."""
    others = {module_of(p): p for p in SOURCES if target_of(p) not in (None, target_of(path))}
    sideways = modules_of(path, set(others))
    assert not sideways, f"{name_of(path)} imports {', '.join(sorted(sideways))} of another target"


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p) != SHARES_PRIVATE_NAMES], ids=name_of)
def test_private_torch_names_stay_in_compat(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {name for name in imports_of(path) if is_private(name)}
    chains = (attribute_chain(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    used |= {chain for chain in chains if chain.startswith("torch._") and is_private(chain)}
    assert not used, f"{name_of(path)} uses {', '.join(sorted(used))}; take it from {SHARES_PRIVATE_NAMES}"


FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
             "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}
OF_INTEGERS = {"arange", "randint", "randperm"}  # whatever the process's default dtype is


def left_to_the_process(tree: ast.AST) -> list[int]:
    """Lines that make a tensor on the default device or in the default dtype, which are the user's to set."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and attribute_chain(node.func) == f"torch.{node.func.attr}" and node.func.attr in FACTORIES]
    said = [(call, {keyword.arg for keyword in call.keywords}) for call in calls]
    return [call.lineno for call, names in said
            if "device" not in names or "dtype" not in names and call.func.attr not in OF_INTEGERS]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_tensors_say_their_dtype_and_device(path):
    lines = left_to_the_process(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, f"{name_of(path)} makes tensors in lines {lines} without dtype= or device="


@pytest.mark.parametrize(("source", "found"), [
    ("torch.zeros(3)", True), ("torch.tensor([1.0], device=d)", True), ("torch.arange(4)", True),
    ("torch.ones(3, dtype=t)", True), ("torch.arange(4, device=d)", False), ("x.new_zeros(3)", False),
    ("torch.empty(3, dtype=t, device=d)", False), ("torch.zeros_like(x)", False),
])
def test_what_is_left_to_the_process(source, found):
    assert bool(left_to_the_process(ast.parse(source))) == found


def positions_of(tree: ast.AST) -> list[int]:
    """Lines in which the arguments of a node are read or set by their position."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and node.attr in ("args", "update_arg", "insert_arg")]


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p).startswith(("runtime/", "lowering/", "passes/"))
                                  and not name_of(p).startswith(KNOWS_POSITIONS) and name_of(p) not in WHOLE_CALLS],
                         ids=name_of)
def test_arguments_of_nodes_have_names(path):
    lines = positions_of(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, (f"{name_of(path)} knows positions of arguments, lines {lines}; read our own ops by the views of "
                       "quartet.lowering.ir, others by argument() and source() in its graph.py")


def test_files_that_take_whole_calls_are_there():
    assert WHOLE_CALLS <= set(map(name_of, SOURCES))


@pytest.mark.parametrize(("source", "found"), [
    ("x = node.args[0]", True), ("a, b = node.args[:2]", True), ("a, b, *rest = gemm.args", True),
    ("node.update_arg(1, x)", True), ("build(op, *node.args)", True), ("x = argument(node, 'dim')", False),
])
def test_every_way_to_a_position_is_seen(source, found):
    assert bool(positions_of(ast.parse(source))) == found


@pytest.mark.parametrize("path", SOURCES + PROGRAMS, ids=name_of)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name_of(path)} has {lines} lines, {lines - MOST_LINES} too many; split it by purpose"


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=name_of)
def test_folders_are_small(folder):
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, f"{name_of(folder)} has {len(files)} files; part it by what they are about"


@pytest.mark.parametrize(("source", "module", "is_package", "names"), [
    ("import torch._dynamo", "quartet.passes.x", False, ["torch._dynamo"]),
    ("from torch._inductor import config", "quartet.passes.x", False, ["torch._inductor.config"]),
    ("from torch import _guards", "quartet.passes.x", False, ["torch._guards"]),
    ("import importlib\nimportlib.import_module('torch._ops')", "quartet.x", False, ["importlib", "torch._ops"]),
    ("def f():\n  from quartet.passes import plan", "quartet.kernels.x", False, ["quartet.passes.plan"]),
    ("from ..passes import plan", "quartet.kernels.x", False, ["quartet.passes.plan"]),
    ("from . import spec", "quartet.kernels", True, ["quartet.kernels.spec"]),
])
def test_every_form_of_import_is_seen(source, module, is_package, names):
    assert list(imported(ast.parse(source), module, is_package)) == names


@pytest.mark.parametrize(("name", "private"), [
    ("torch._inductor.config", True), ("torch.fx._utils", True), ("torch.fx.node", False), ("torch.__version__", False),
    ("numpy._core", False),
])
def test_what_counts_as_private(name, private):
    assert is_private(name) is private
