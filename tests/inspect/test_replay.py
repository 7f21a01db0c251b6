"""``quartet.replay``: a dumped graph on tensors of one's own, up to the first that is not finite."""

import math

import pytest
import torch
from harness import compile_eager
from torch import nn

import quartet
from quartet.cli.main import main
from quartet.inspect.replay import ReplayError


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    compiled, _ = compile_eager(model, "fp8", dump=str(folder))
    compiled(torch.randn(64, 32)).sum().backward()
    graph, = folder.glob("graph_*")
    return graph


def names(dump):
    with pytest.raises(ReplayError) as error:
        quartet.replay(dump, [])
    return str(error.value).partition(": ")[2].split(", ")


def test_random_inputs_are_finite(dump):
    found = quartet.replay(dump)
    assert found.bad is None and "all results are finite" in str(found) and len(found.results) == 6
    assert found.path == max(dump.glob("[0-9]*.py")), "the graph after the last pass"


def test_an_infinite_input_is_named(dump):
    name = next(name for name in names(dump) if name.startswith("primals"))
    wanted = inputs_of(dump)[name].clone()
    wanted.view(-1)[3] = math.inf
    found = quartet.replay(dump, {name: wanted})
    assert found.bad.where == name and found.bad.count == 1 and found.results is None and name in str(found)


def inputs_of(dump):
    from quartet.inspect.replay import _loaded, _module_path

    module = _loaded(_module_path(dump))
    return dict(zip(names(dump), module.inputs(), strict=True))


def test_the_first_operator_that_overflows_is_named(dump):
    """Each input is finite; the product of the codes and their scales is not."""
    given = {name: value * 1e30 if value.dtype.is_floating_point else value for name, value in inputs_of(dump).items()}
    found = quartet.replay(dump, given)
    assert "scaled_mm" in found.bad.where and "quartet" in found.bad.text and found.bad.what == "infinite"
    assert f"line {found.bad.line}" in str(found)
    line = found.path.read_text(encoding="utf-8").splitlines()[found.bad.line - 1]
    assert found.bad.text.split("=")[0].strip() in line


def test_infinities_that_the_code_writes_are_meant(tmp_path):
    path = tmp_path / "graph.py"
    path.write_text("""import torch

class Graph(torch.nn.Module):
    def forward(self, x):
        masked = torch.ops.aten.masked_fill.Scalar(x, x > 0, float("-inf"))
        most = torch.ops.aten.amax.default(masked, [-1], True)
        shifted = torch.ops.aten.sub.Tensor(masked, most)
        return torch.ops.aten.exp.default(shifted)

def inputs():
    return (torch.tensor([[-1.0, 2.0], [-1.0, -2.0]]),)
""")
    assert quartet.replay(path).bad is None
    found = quartet.replay(path, [torch.ones(2, 2)])
    assert found.bad.what == "NaN" and "sub" in found.bad.where, "a row of infinities alone is a mistake"


def test_parameters_have_the_names_of_the_model(dump):
    weight = torch.zeros(48, 32)
    weight[5, 6] = math.nan
    assert quartet.replay(dump, {"0.weight": weight}).bad.where == "primals_1"


def test_parameters_of_a_compiled_model_and_of_other_graphs(dump):
    weight = nn.Parameter(torch.full((48, 32), math.nan))
    given = {"_orig_mod.0.weight": weight, "of_another.weight": nn.Parameter(torch.ones(3))}
    assert quartet.replay(dump, given).bad.where == "primals_1"


def test_infinities_that_vanish_are_no_mistake_and_those_that_become_nan_are_named(tmp_path):
    path = tmp_path / "graph.py"
    path.write_text("""import torch

class Graph(torch.nn.Module):
    def forward(self, x):
        large = torch.ops.aten.exp.default(x)
        more = torch.ops.aten.add.Tensor(large, 1.0)
        sigmoid = torch.ops.aten.reciprocal.default(more)
        square = torch.ops.aten.mul.Tensor(x, x)
        cube = torch.ops.aten.mul.Tensor(square, x)
        return torch.ops.aten.mul.Tensor(cube, sigmoid)

def inputs():
    return (torch.tensor([1.0]),)
""")
    assert quartet.replay(path, [torch.tensor([1e5])]).bad is None
    found = quartet.replay(path, [torch.tensor([1e30])])
    assert found.bad.text.startswith("square =") and found.bad.line == 8, "0 · inf, of what became infinite there"


@pytest.mark.parametrize("given, message", [
    ({"primal_1": torch.ones(1)}, "did you mean 'primals_1'"), ([torch.ones(1)], "inputs, not 1"),
    (torch.ones(1), r"a list of all in order, or a dict of some by name, not torch.float32 \(1,\)"), (3, "not int"),
    ({"primals_1": torch.ones(3)}, r"'primals_1' is torch.float32 \(48, 32\), not torch.float32 \(3,\)"),
])
def test_inputs_that_are_not_its_own(dump, given, message):
    with pytest.raises(ReplayError, match=message):
        quartet.replay(dump, given)


def test_what_is_no_graph(dump, tmp_path):
    with pytest.raises(ReplayError, match="no file or folder"):
        quartet.replay(tmp_path / "none")
    with pytest.raises(ReplayError, match="name one of graph_000"):
        quartet.replay(dump.parent)
    for code, said in (("x = (", "SyntaxError"), ("import no_such_module", "ModuleNotFoundError: No module named")):
        (tmp_path / "other.py").write_text(code)
        with pytest.raises(ReplayError, match=f"other.py does not run as a module of a dump: {said}"):
            quartet.replay(tmp_path / "other.py")
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(ReplayError, match="no class Graph"):
        quartet.replay(tmp_path / "other.py")


def test_the_command(dump, tmp_path, capsys):
    assert main(["replay", str(dump)]) == 0 and "all results are finite" in capsys.readouterr().out
    torch.save({"0.weight": torch.full((48, 32), math.inf)}, tmp_path / "inputs.pt")
    assert main(["replay", str(dump), "--inputs", str(tmp_path / "inputs.pt")]) == 1
    assert "input primals_1: 1536 of 1536 elements are infinite" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert main(["suggest", "model:make"]) == 2 and "--error" in capsys.readouterr().err


def test_tensors_of_a_gpu_are_read_where_there_is_none(dump, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    torch.save({"0.weight": torch.full((48, 32), math.nan)}, tmp_path / "inputs.pt")
    assert main(["replay", str(dump), "--inputs", str(tmp_path / "inputs.pt")]) == 1
    assert "input primals_1: 1536 of 1536 elements are NaN" in capsys.readouterr().out


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"PK\x03\x04 cut off"),
                                   lambda path: path.write_text("not tensors"),
                                   lambda path: torch.save(nn.Linear(2, 2), path)])
def test_files_that_hold_no_tensors(dump, tmp_path, capsys, write):
    write(tmp_path / "inputs.pt")
    assert main(["replay", str(dump), "--inputs", str(tmp_path / "inputs.pt")]) == 2
    said = capsys.readouterr().err
    assert "inputs.pt as tensors that torch.save wrote: " in said and "weights_only" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_of_a_gpu_where_there_is_none(tmp_path):
    (tmp_path / "graph.py").write_text("x = torch.empty(2, device='cuda:0')\n")
    with pytest.raises(ReplayError, match="a graph for cuda:0, and PyTorch sees no GPU here"):
        quartet.replay(tmp_path / "graph.py")
