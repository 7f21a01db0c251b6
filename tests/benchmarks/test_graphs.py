"""``graphs.py``: its text ignores the names of nodes and nothing else, and a difference is found."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def script(monkeypatch):
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module("graphs")


def traced():
    return make_fx(lambda x, y: torch.cat([x.sum(1, keepdim=True), y.t()], 1), tracing_mode="fake")(
        torch.randn(3, 4), torch.randn(2, 3)).graph


def changed_argument(graph, node):
    node.args = (node.args[0], [0], *node.args[2:])


def other_order(graph, node):
    node.append(next(n for n in graph.nodes if n.op == "placeholder"))


def direction(graph, node):
    node.meta["partitioner_tag"] = "is_backward"


def recomputed(graph, node):
    node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE


def dtype(graph, node):
    node.meta["val"] = node.meta["val"].double()


def strides(graph, node):
    node.meta["val"] = node.meta["val"].new_empty_strided((3, 1), (1, 3))


def test_names_do_not_matter(script):
    graph, other = traced(), traced()
    for i, node in enumerate(other.nodes):
        node._rename(f"node_{9 - i}")
    assert [n.name for n in graph.nodes] != [n.name for n in other.nodes]
    assert script.text_of_graph(graph) == script.text_of_graph(other)


@pytest.mark.parametrize("change", [changed_argument, other_order, direction, recomputed, dtype, strides])
def test_everything_else_does(script, change):
    graph, other = traced(), traced()
    change(other, next(n for n in other.nodes if n.target is torch.ops.aten.sum.dim_IntList))
    assert script.text_of_graph(graph) != script.text_of_graph(other)


def test_a_run_equals_itself_and_differs_from_another_recipe(script, tmp_path, capsys):
    def run(folder, *more):
        return script.main(["--out", str(tmp_path / folder), "--models", "custom", "--settings", "fp8", "--targets",
                            "sm_90", *more])

    assert run("a") == 0 and run("b", "--against", str(tmp_path / "a")) == 0
    assert "0 of 1 differ" in capsys.readouterr().out
    (path,) = (tmp_path / "a").iterdir()
    text = path.read_text()
    assert all(f"== {part}\n" in text for part in ("joint graph", "forward", "backward", "products", "saved"))
    path.write_text(text.replace("cublaslt", "another", 1))
    assert run("b", "--against", str(tmp_path / "a")) == 1
    shown = capsys.readouterr().out
    assert "another" in shown and "1 of 1 differ" in shown and len(shown.splitlines()) < 12
    path.unlink()
    assert run("b", "--against", str(tmp_path / "a")) == 1 and "only in" in capsys.readouterr().out

