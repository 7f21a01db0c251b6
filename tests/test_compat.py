"""The one place where private PyTorch is touched: complete, present in this version, and clear about what lacks."""

import ast
import importlib
import inspect
import warnings

import pytest
import torch

from quartet.runtime import compat


@pytest.mark.parametrize("module, name", [entry[:2] for entry in compat.PRIVATE], ids=".".join)
def test_private_name_exists_here(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_nothing_is_missing_here():
    assert compat.missing() == []


def test_entries_are_distinct_and_have_a_purpose():
    assert len({entry[:2] for entry in compat.PRIVATE}) == len(compat.PRIVATE)
    assert all(purpose.strip() for _, _, purpose in compat.PRIVATE)


def private(module):
    return module.startswith("torch.") and any(part.startswith("_") for part in module.split("."))


def loaded(tree):
    """(module, name) of every private import in a syntax tree, also those by string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and private(node.module or ""):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.rsplit(".", 1)) for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Call) and node.args and all(isinstance(arg, ast.Constant) for arg in node.args):
            called = ast.unparse(node.func)
            if called == "_load":
                yield node.args[0].value, node.args[1].value
            elif called == "importlib.import_module" and private(node.args[0].value):
                yield tuple(node.args[0].value.rsplit(".", 1))


def test_every_private_import_is_listed():
    found = set(loaded(ast.parse(inspect.getsource(compat))))
    assert {("torch._inductor.compile_fx", "compile_fx"), ("torch._inductor", "config"),
            ("torch._dynamo", "config")} <= found, "the parser finds all three ways to import"
    assert found - {entry[:2] for entry in compat.PRIVATE} == set()


def test_the_helpers_at_the_end_of_the_file_are_covered():
    listed = {entry[:2] for entry in compat.PRIVATE}
    for needed in (("torch._inductor.decomposition", "select_decomp_table"),
                   ("torch._inductor.lowering", "register_lowering"),
                   ("torch._inductor.lowering", "process_subgraph_nodes"),
                   ("torch._logging._internal", "log_registry"), ("torch._dynamo", "config")):
        assert needed in listed


def test_every_entry_is_used():
    tree = ast.parse(inspect.getsource(compat))
    used = {name for _, name in loaded(tree)} | {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    assert [name for _, name, purpose in compat.PRIVATE if name not in used and "for tests" not in purpose] == []


def test_a_name_that_lacks_is_reported_with_its_purpose(monkeypatch):
    monkeypatch.delattr("torch._inductor.virtualized.V")
    assert compat.missing() == ["torch._inductor.virtualized.V (the graph that Inductor is lowering)"]


def test_a_module_that_lacks_is_reported(monkeypatch):
    monkeypatch.setattr(compat, "PRIVATE", (*compat.PRIVATE, ("torch._gone", "thing", "an example")))
    assert compat.missing() == ["torch._gone.thing (an example)"]


def test_loading_what_lacks_names_it_the_version_and_all_that_lacks(monkeypatch):
    monkeypatch.delattr("torch._inductor.lowering.register_lowering")
    with pytest.raises(ImportError) as error:
        compat.register_inductor_lowering(torch.ops.aten.mm.default, lambda graph, operands: None)
    text = str(error.value)
    assert "torch._inductor.lowering.register_lowering" in text and torch.__version__ in text
    assert all(version in text for version in compat.TESTED) and "decomposition of our ops" in text


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cpu", "3.0.0a0"])
def test_an_untested_version_is_warned_about_once(monkeypatch, version):
    monkeypatch.setattr(compat, "_warned", False)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.warns(UserWarning, match=f"torch {version.replace('+', '.')} has never been tested"):
        compat.warn_if_untested()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_untested()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1"])
def test_a_tested_version_is_not_warned_about(monkeypatch, version):
    monkeypatch.setattr(compat, "_warned", False)
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_untested()
    assert not compat._warned


def test_this_version_is_a_tested_one():
    assert ".".join(torch.__version__.split(".")[:2]) in compat.TESTED


def test_a_partitioner_with_other_steps_changes_nobody_elses():
    whole = compat.partitioner({"custom_partitioner_fn": None})[1]
    seen = []

    def first(theirs):
        def step(*args, **kwargs):
            seen.append(theirs)
            raise StopIteration
        return step

    made = compat.with_steps(whole, fx_graph_cse=first)
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(StopIteration):
        made(gm, (), num_fwd_outputs=1)
    assert seen == [whole.__globals__["fx_graph_cse"]] and made.__kwdefaults__ == whole.__kwdefaults__
    assert compat.with_steps(whole, step_of_another_version=first) is None
    assert compat.with_steps(lambda *args: None, fx_graph_cse=first) is None


def test_minimum_cuts_are_asked_for_and_put_back(monkeypatch):
    networkx = pytest.importorskip("networkx")
    asked = importlib.import_module("torch._functorch.partitioners")
    asked = asked if hasattr(asked, "minimum_cut") else networkx
    theirs, graph = asked.minimum_cut, networkx.DiGraph()
    graph.add_edge(0, 1, capacity=3)
    with compat.cutting_by(lambda graph, source, sink: "ours"):
        assert asked.minimum_cut(graph, 0, 1) == "ours"
    with compat.cutting_by(lambda graph, source, sink: None):
        assert asked.minimum_cut(graph, 0, 1) == (3, ({0}, {1}))
    assert asked.minimum_cut is theirs


def test_minimum_cuts_are_put_back_by_whichever_compilation_ends_last():
    networkx = pytest.importorskip("networkx")
    asked = importlib.import_module("torch._functorch.partitioners")
    asked = asked if hasattr(asked, "minimum_cut") else networkx
    theirs = asked.minimum_cut
    first, second = (compat.cutting_by(lambda graph, source, sink: "ours") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert asked.minimum_cut(networkx.DiGraph(), 0, 1) == "ours"
    second.__exit__(None, None, None)
    assert asked.minimum_cut is theirs
