"""Dumped graphs run, say what changed, and never stop a compilation."""

import json
import operator
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import quartet.lowering  # noqa: F401  defines torch.ops.quartet
from quartet.lowering.recipe.records import MatmulRecord
from quartet.report.dump import GraphDump, count_diff, format_diff, op_counts
from quartet.report.graph_code import OP_MODULE, STAND_IN, describe, hint, print_graph
from quartet.report.svg import dataflow, draw

aten = torch.ops.aten
SPEC = "e2m1/32 e8m0 ceil nearest"
RECORD = MatmulRecord(0, "layers.0.q", "linear", "fprop", 4, 32, 64, "float32", "quartet", "reference")


def example(rows: int = 4) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    return torch.randn(rows, 64, generator=gen), torch.randn(64, 64, generator=gen), torch.randn(64, 32, generator=gen)


def two_layers(x: torch.Tensor, w0: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A residual two-layer network and its gradients, as one graph."""
    h = x @ w0
    y = (torch.relu(h) + x) @ w1
    gy = y - 1
    gw1 = (torch.relu(h) + x).t() @ gy
    gh = torch.where(h > 0, gy @ w1.t(), 0.0)
    return y, x.t() @ gh, gw1


def traced(mode: str = "fake", rows: int = 4) -> fx.GraphModule:
    """``two_layers`` with the metadata that AOTAutograd gives."""
    gm = make_fx(two_layers, tracing_mode=mode)(*example(rows))
    backward = False
    for node in gm.graph.nodes:
        backward = backward or node.target is aten.sub.Tensor
        node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
    sites = iter((0, 1, 1, 1, 0))
    for node in gm.graph.nodes:
        if node.target is aten.mm.default:
            site = node.meta["seq_nr"] = next(sites)
            node.meta["nn_module_stack"] = {"1": (f"L['self'].layers.{site}.proj", torch.nn.Linear)}
    return gm


def quantize_first(gm: fx.GraphModule) -> None:
    """Replaces the first mm by quantise ×2 and scaled_mm; a pass as the pipeline has them."""
    node = next(n for n in gm.graph.nodes if n.target is aten.mm.default)
    a, b = node.args

    def call(target, *args):
        new = gm.graph.call_function(target, args)
        new.meta = {k: v for k, v in node.meta.items() if k != "val"}
        new.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return new

    with a.meta["val"].fake_mode, gm.graph.inserting_before(node):
        pairs = []
        for operand in (a, call(aten.t.default, b)):
            q = call(torch.ops.quartet.quantize.default, operand, SPEC, None, 0)
            pairs += [call(operator.getitem, q, 0), call(operator.getitem, q, 1)]
        product = call(torch.ops.quartet.scaled_mm.default, *pairs, SPEC, SPEC, torch.float32)
    node.replace_all_uses_with(product)
    gm.graph.erase_node(node)
    gm.recompile()


def observe(dump: GraphDump, gm: fx.GraphModule, index: int = 0, name: str = "quantize", run=quantize_first) -> None:
    dump.before(index, name, gm)
    run(gm)
    dump.after(index, name, gm, 0.25)


def load(gm: fx.GraphModule, folder: Path) -> dict:
    """The namespace of the printed graph, with its constants beside it."""
    code = print_graph(gm, "a graph")
    torch.save(code.constants, folder / "constants.pt")
    (folder / "graph.py").write_text(code.source)
    return runpy.run_path(str(folder / "graph.py"), run_name="dumped")


def built(*steps, inputs=()) -> fx.GraphModule:
    """A graph of (target, args) calls; the last one is returned. Inputs are example values of the placeholders."""
    graph = fx.Graph()
    nodes = []
    for i, value in enumerate(inputs):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["val"] = value
    for target, args in steps:
        nodes.append(graph.call_function(target, tuple(nodes[a.index] if isinstance(a, Ref) else a for a in args)))
    graph.output(nodes[-1])
    return fx.GraphModule(torch.nn.Module(), graph)


class Ref:
    """The value of an earlier step."""

    def __init__(self, index: int) -> None:
        self.index = index


# ── the printed graph ──

@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_printed_graph_computes_what_the_graph_computes(tmp_path, mode):
    gm = traced(mode)
    printed = load(gm, tmp_path)["Graph"]()
    for ours, theirs in zip(printed(*example()), gm(*example()), strict=True):
        assert torch.equal(ours, theirs)


def test_printed_graph_with_symbolic_sizes_serves_other_sizes(tmp_path):
    gm = traced("symbolic")
    namespace = load(gm, tmp_path)
    assert torch.equal(namespace["Graph"]()(*example(7))[0], two_layers(*example(7))[0])
    assert [value.shape for value in namespace["inputs"]()] == [value.shape for value in example()]


def test_a_size_that_depends_on_data_gets_a_stand_in():
    assert hint(ShapeEnv().create_unbacked_symint(), STAND_IN) == STAND_IN


def test_inputs_have_the_traced_shapes_dtypes_and_strides(tmp_path):
    values = (torch.randn(3, 5).t(), torch.ones(4, 1).expand(4, 6), torch.zeros(2, dtype=torch.int64),
              torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.float8_e4m3fn),
              torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.uint8), 5)
    made = load(built((operator.add, (Ref(0), Ref(0))), inputs=values), tmp_path)["inputs"]()
    for value, other in zip(values[:-1], made[:-1], strict=True):
        assert (value.shape, value.stride(), value.dtype) == (other.shape, other.stride(), other.dtype)
    assert made[-1] == 5


def test_integer_inputs_are_valid_indices(tmp_path):
    index = torch.zeros(100, dtype=torch.int64)
    made, = load(built((operator.neg, (Ref(0),)), inputs=(index,)), tmp_path)["inputs"]()
    assert set(made.tolist()) == {0, 1}


@pytest.mark.parametrize("target, args, expected", [
    (aten.full.default, ([2], float("-inf")), torch.full((2,), float("-inf"))),
    (aten.full.default, ([2], 1), torch.ones(2, dtype=torch.int64)),
    (operator.getitem, ((1, 2, 3), slice(0, None, 2)), (1, 3)),
    (operator.getitem, ([[1], [2]], -1), [2]),
    (torch.sym_max, (3, 4), 4),
    (torch.nn.functional.relu, (-1.0,), None),
])
def test_literals_and_targets_survive(tmp_path, target, args, expected):
    namespace = load(built((target, args)), tmp_path)
    if expected is None:
        assert "torch.nn.functional.relu(-1.0)" in (tmp_path / "graph.py").read_text()
        return
    result = namespace["Graph"]()()
    assert torch.equal(result, expected) if isinstance(expected, torch.Tensor) else result == expected


def test_dtypes_devices_and_layouts_have_a_python_form(tmp_path):
    graph = fx.Graph()
    made = graph.call_function(aten.empty.memory_format, ([2, 3, 4, 5],), {
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "layout": torch.strided,
        "memory_format": torch.channels_last})
    graph.output(made)
    result = load(fx.GraphModule(torch.nn.Module(), graph), tmp_path)["Graph"]()()
    assert result.dtype is torch.bfloat16 and result.is_contiguous(memory_format=torch.channels_last)


def test_constants_are_saved_beside(tmp_path):
    table = torch.tensor([float("nan"), 0.1, -0.0])
    gm = make_fx(lambda x: x + table)(torch.ones(3))
    assert any(n.op == "get_attr" for n in gm.graph.nodes)
    result = load(gm, tmp_path)["Graph"]()(torch.zeros(3))
    assert torch.equal(result.nan_to_num(7.0), table.nan_to_num(7.0))


def test_nested_graphs_are_printed(tmp_path):
    inner = make_fx(lambda x: (x.sin(),))(torch.ones(3))
    outer = torch.nn.Module()
    outer.body = inner
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(3)
    body = graph.get_attr("body")
    graph.output(graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, "body", x)))
    result = load(fx.GraphModule(outer, graph), tmp_path)["Graph"]()(torch.ones(3))
    assert torch.equal(result[0], torch.ones(3).sin())


def test_an_argument_without_python_form_is_said_at_the_top():
    code = print_graph(built((operator.is_, (Fraction(1, 2), None))), "odd")
    assert len(code.obstacles) == 1 and "type Fraction" in code.obstacles[0]
    assert "Does not run as it stands" in code.source.splitlines()[2]
    compile(code.source, "odd.py", "exec")


def test_lines_carry_shapes_names_and_sections():
    text = print_graph(traced(), "t").source
    assert text.index("━ forward ━") < text.index("# layers.1.proj") < text.index("━ backward ━")
    mm = next(line for line in text.splitlines() if line.strip().startswith("mm ="))
    assert mm.endswith("# f32[4, 64]")


def test_values_are_freed_after_their_last_use():
    lines = print_graph(traced(), "t").source.splitlines()
    relu = next(i for i, line in enumerate(lines) if "aten.relu.default(" in line)
    add = next(i for i, line in enumerate(lines) if "aten.add.Tensor(relu" in line)
    assert "del" not in lines[relu] and "; del relu" in lines[add]


def test_describe_names_dtypes_and_structure():
    assert describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert describe((torch.zeros(1, dtype=torch.uint8), None)) == "(u8[1], None)"
    assert describe(torch.zeros(1, dtype=torch.complex64)) == "complex64[1]"


# ── the folder ──

@pytest.mark.slow
def test_dumped_files_run_as_programs(tmp_path):
    dump = GraphDump(tmp_path)
    observe(dump, traced())
    ran = subprocess.run([sys.executable, str(tmp_path / "graph_000" / "00_quantize.py")], capture_output=True,
                         text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[1] for line in ran.stdout.splitlines()] == ["float32"] * 3
    assert ran.stdout.count("finite True") == 3


@pytest.mark.slow
def test_what_a_dumped_file_imports_defines_every_op():
    """In a process of its own, where nothing has been compiled."""
    code = f"""
import torch, {OP_MODULE}
ops = lambda: {{name for name in torch._C._dispatch_get_all_op_names() if name.startswith("quartet::")}}
defined = ops()
import quartet.backend, quartet.direct, quartet.distributed, quartet.explain, quartet.optim
print(sorted(ops() - defined))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.stdout == "[]\n", ran.stderr


def test_before_and_after_are_the_graphs_before_and_after(tmp_path):
    gm = traced()
    expected_before = gm(*example())
    observe(GraphDump(tmp_path), gm)
    for stem, expected in (("00_captured", expected_before), ("00_quantize", gm(*example()))):
        printed = runpy.run_path(str(tmp_path / "graph_000" / f"{stem}.py"), run_name="dumped")
        for ours, theirs in zip(printed["Graph"]()(*example()), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(expected_before[0], gm(*example())[0])


def test_dumped_constants_belong_to_their_file(tmp_path):
    table = torch.arange(3.0)
    gm = make_fx(lambda x: x * table)(torch.ones(3))
    dump = GraphDump(tmp_path)
    observe(dump, gm, run=lambda gm: setattr(gm, "_tensor_constant0", table + 10))
    results = [runpy.run_path(str(tmp_path / "graph_000" / f"{stem}.py"), run_name="dumped")["Graph"]()(
        torch.ones(3)) for stem in ("00_captured", "00_quantize")]
    assert torch.equal(results[0], table) and torch.equal(results[1], table + 10)


def test_the_diff_counts_operations(tmp_path):
    gm = traced()
    before = op_counts(gm)
    observe(GraphDump(tmp_path), gm)
    assert count_diff(before, op_counts(gm)) == {"operator.getitem": 4, "quartet.quantize": 2, "aten.t": 1,
                                                 "quartet.scaled_mm": 1, "aten.mm": -1}
    lines = (tmp_path / "graph_000" / "00_quantize.diff").read_text().splitlines()
    assert lines[:2] == ["--- 00_captured.py", "+++ 00_quantize.py"]
    assert any(line.startswith("+") and "quartet.quantize" in line for line in lines)
    assert any(line.startswith("-") and "aten.mm" in line for line in lines)


def test_diff_as_text():
    assert format_diff(count_diff(Counter(a=7), Counter(b=14))) == "+14 b, -7 a"
    assert format_diff({}) == "no op added or removed"


def test_index_links_to_what_is_there(tmp_path):
    dump = GraphDump(tmp_path)
    gm = traced()
    observe(dump, gm)
    observe(dump, gm, 1, "share", lambda gm: None)
    dump.finish([RECORD], gm)
    folder = tmp_path / "graph_000"
    page = (folder / "index.html").read_text()
    links = [part.split('"')[0] for part in page.split('href="')[1:]]
    assert len(links) == 5 and all((folder / link).is_file() for link in links)
    assert "+2 quartet.quantize" in page and "changed nothing" in page and "250.0 ms" in page
    assert not list(folder.glob("01_*")), "a graph that is the same is written once"
    assert "layers.0.q" in page and "<svg" in page
    assert json.loads((folder / "matmuls.json").read_text())["matmuls"] == [RECORD.as_dict()]


def test_each_graph_and_each_process_gets_its_own_folder(tmp_path):
    first, second = GraphDump(tmp_path), GraphDump(tmp_path)
    gm = traced()
    observe(first, gm, run=lambda gm: None)
    observe(second, gm, run=lambda gm: None)
    first.finish([], gm)
    observe(first, gm, run=lambda gm: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_000", "graph_001", "graph_002",
                                                          "index.html"]
    assert first.folder == tmp_path / "graph_002"
    assert (tmp_path / "graph_000" / "index.html").exists()


def test_a_compilation_that_stopped_half_way_does_not_mix_with_the_next(tmp_path):
    dump = GraphDump(tmp_path)
    dump.before(0, "a", traced())
    dump.before(1, "b", traced())
    dump.before(0, "a", traced())
    assert [p.name for p in sorted((tmp_path / "graph_001").iterdir())] == ["00_captured.py"]


def test_the_rank_is_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    GraphDump(tmp_path).before(0, "a", traced())
    assert [p.name for p in tmp_path.iterdir()] == ["rank3_graph_000"]


def test_failure_warns_once_and_goes_on(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    dump = GraphDump(blocked)
    gm = traced()
    with pytest.warns(UserWarning, match="could not dump a graph to .*file.*compilation goes on") as caught:
        observe(dump, gm)
        dump.finish([RECORD], gm)
    assert len(caught) == 1 and dump.failure


def test_artifacts_are_emitted_even_without_a_folder():
    seen: dict[str, str] = {}
    dump = GraphDump(None, seen.__setitem__)
    gm = traced()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(dump, gm)
        dump.finish([RECORD], gm)
        observe(dump, gm, run=lambda gm: None)
    assert set(seen) == {f"quartet_graph_000_{name}" for name in (
        "00_captured.py", "00_quantize.py", "00_quantize.diff", "matmuls.json", "matmuls.svg", "about.json",
        "index.html")} | {"quartet_graph_001_00_captured.py"}
    assert dump.folder is None


def test_the_pages_say_what_was_compiled_and_keep_what_a_model_names_from_being_markup(tmp_path):
    gm = traced()
    for policy in ("fp8", "<b>own</b>"):
        dump = GraphDump(tmp_path, about={"policy": policy, "device": "cpu"}, names=lambda graph: {"x_1": "a.weight"})
        observe(dump, gm, run=lambda gm: None)
        dump.finish([replace(RECORD, fqn="<script>alert(1)</script>")], gm)
        dump.kept(3 << 20)
    page, listing = (tmp_path / "graph_001" / "index.html").read_text(), (tmp_path / "index.html").read_text()
    assert "&lt;b&gt;own&lt;/b&gt;" in page and "<b>own" not in page + listing and "alert(1)</script>" not in page
    assert listing.count('href="graph_00') == 2 and "fp8" in listing and "3.0 MiB" in page and "3.0 MiB" in listing
    assert json.loads((tmp_path / "graph_000" / "matmuls.json").read_text())["saved_bytes_total"] == 3 << 20
    assert json.loads((tmp_path / "graph_000" / "about.json").read_text())["policy"] == "fp8"


def test_parameters_are_named_at_their_placeholders():
    code = print_graph(traced(), "t", names={"w0_1": "layers.0.weight"}).source
    assert sum("layers.0.weight" in line for line in code.splitlines()) == 2


@pytest.mark.slow
def test_a_dumped_graph_runs_on_tensors_of_the_user(tmp_path):
    observe(GraphDump(tmp_path), traced(), run=lambda gm: None)
    torch.save(example(), tmp_path / "inputs.pt")
    ran = subprocess.run([sys.executable, str(tmp_path / "graph_000" / "00_captured.py"), str(tmp_path / "inputs.pt")],
                         capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and ran.stdout.count("finite True") == 3, ran.stderr


# ── the drawing ──

def test_dataflow_runs_through_other_ops_and_drops_what_is_implied():
    gm = make_fx(lambda x, w: (((x @ w).relu() @ w) + (x @ w)) @ w, tracing_mode="fake")(
        torch.ones(4, 4), torch.ones(4, 4))
    flow = dataflow(gm)
    assert set(flow.edges) == {("mm", "mm_1"), ("mm_1", "mm_3"), ("mm_2", "mm_3")}
    residual = make_fx(lambda x, w: (lambda h: (h @ w + h) @ w)(x @ w), tracing_mode="fake")(
        torch.ones(4, 4), torch.ones(4, 4))
    assert set(dataflow(residual).edges) == {("mm", "mm_1"), ("mm_1", "mm_2")}


def test_dataflow_knows_direction_and_what_is_quantised():
    gm = traced()
    quantize_first(gm)
    boxes = [data["box"] for _, data in dataflow(gm).nodes(data=True)]
    assert Counter((b.kind, b.backward) for b in boxes) == {
        ("op", False): 2, ("matmul", False): 1, ("alone", False): 1, ("alone", True): 3}
    assert {b.module for b in boxes} == {"layers.0.proj", "layers.1.proj"}


def test_big_graphs_are_cut_and_say_so():
    flow = dataflow(traced(), max_sites=1)
    assert {data["box"].module for _, data in flow.nodes(data=True)} == {"layers.0.proj"}
    assert flow.number_of_nodes() == 2
    assert "the first 1 of 2 forward matmuls" in draw(flow)
    assert "the first" not in draw(dataflow(traced()))


def test_drawing_is_well_formed_and_complete():
    gm = traced()
    quantize_first(gm)
    flow = dataflow(gm)
    root = ElementTree.fromstring(draw(flow, "a <title> & more"))
    svg = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{svg}g")) == flow.number_of_nodes()
    paths = [p.get("class") for p in root.findall(f"{svg}path")]
    crossing = sum(flow.nodes[a]["box"].backward != flow.nodes[b]["box"].backward for a, b in flow.edges)
    assert crossing > 0 and len(paths) == flow.number_of_edges() + 1 and paths.count("saved") == crossing + 1


def test_boxes_do_not_overlap_and_stay_inside():
    root = ElementTree.fromstring(draw(dataflow(traced())))
    svg = "{http://www.w3.org/2000/svg}"
    rects = [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in root.iter(f"{svg}rect")]
    wide, high = float(root.get("width")), float(root.get("height"))
    for i, (x, y, w, h) in enumerate(rects):
        assert 0 <= x and 0 <= y and x + w <= wide and y + h <= high
        assert not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in rects[:i])


def test_a_graph_without_matmuls_draws():
    ElementTree.fromstring(draw(dataflow(make_fx(torch.sin)(torch.ones(2)))))


def test_the_drawing_shows_the_graph_with_the_most_quantised_matmuls(tmp_path):
    dump = GraphDump(tmp_path)
    gm = traced()
    observe(dump, gm)
    lowered = traced()
    dump.before(1, "lower", gm)
    dump.after(1, "lower", lowered, 0.0)
    dump.finish([RECORD], lowered)
    assert "after pass quantize" in (tmp_path / "graph_000" / "matmuls.svg").read_text()
