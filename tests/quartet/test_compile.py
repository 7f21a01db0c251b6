"""``quartet.compile``: in place, with the model's own class and keys, of layers of ``torch.nn`` too."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quartet
from quartet.options import OptionError
from quartet.passes.plan.plan import UnsupportedMatmul
from quartet.recipes import PolicyError
from quartet.runtime.compat import is_skipped


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The backend runs its graphs uncompiled; what it quantised in each is listed."""
    from quartet.backend import compile_graph
    from quartet.lowering import registry
    from quartet.options import Options
    from quartet.passes import pipeline
    from quartet.runtime.capture import Capture

    torch._dynamo.reset()
    found = []

    def backend(gm, inputs, *, mode=None, options=None):
        parsed = Options.parse(mode, options, passes=pipeline.OPTIONAL, kernels=registry.NAMES)
        records = []
        compiled = compile_graph(gm, inputs, parsed, inner_compile=Capture(), collect=records.extend)
        found.append({r.fqn for r in records if r.lowered})
        return compiled

    torch._dynamo.lookup_backend("quartet")
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "quartet", backend)
    return found


def test_the_model_is_itself_and_runs_quantised(graphs):
    model = MLP()
    keys, exact = list(model.state_dict()), model(x := torch.randn(32, 64))
    assert quartet.compile(model, "quartet", strict=True) is model and type(model) is MLP
    assert list(model.state_dict()) == keys
    assert 0 < (model(x) - exact).norm() / exact.norm() < 0.5
    assert graphs == [{"up", "down"}]


@pytest.mark.parametrize("build", [lambda: nn.Linear(64, 96), lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU()),
                                   lambda: nn.Sequential(MLP(), MLP()), MLP])
def test_layers_of_torch_are_captured_as_torch_compile_captures_them(graphs, build):
    model, x = build(), torch.randn(32, 64)
    torch.compile(model, backend="quartet", options={"policy": "quartet"})(x)
    torch._dynamo.reset()
    quartet.compile(model, "quartet")(x)
    assert len(graphs) == 2 and graphs[0] == graphs[1] != set()


def test_a_mode_and_options_together(graphs):
    model = quartet.compile(MLP(), "fp8", mode="max-autotune-no-cudagraphs", strict=True)
    model(torch.randn(32, 64))
    assert graphs == [{"up", "down"}]


def test_the_last_call_counts(graphs):
    model, x = MLP(), torch.randn(32, 64)
    exact = model(x)
    quartet.compile(quartet.compile(model, "quartet"), "bf16")
    assert torch.equal(model(x), exact) and graphs == [set()]


def test_a_copy_is_not_compiled(graphs):
    model = quartet.compile(MLP(), "quartet")
    copy.deepcopy(model)(torch.randn(32, 64))
    assert graphs == []


def test_explained_with_its_own_options_and_left_compiled(graphs):
    model, x = quartet.compile(MLP(), quartet.Policy("fp8").on("down", None)), torch.randn(32, 64)
    rows = [r.fqn for r in quartet.explain(model, x).records if r.lowered]
    assert set(rows) == {"up"} and graphs == []
    model(x)
    assert graphs == [{"up"}]


@pytest.mark.parametrize(("arguments", "error", "text"), [
    (dict(policy="quartte"), PolicyError, "did you mean 'quartet'"),
    (dict(strickt=True), OptionError, "did you mean 'strict'"),
    (dict(mode="fast"), OptionError, "unknown mode 'fast'"),
    (dict(options={"strict": True}), OptionError, "no argument 'options'"),
    (dict(backend="inductor"), OptionError, "no argument 'backend'"),
])
def test_wrong_arguments_are_refused_where_they_are_given(arguments, error, text):
    with pytest.raises(error, match=text):
        quartet.compile(MLP(), **arguments)


def test_only_models_are_taken():
    with pytest.raises(TypeError, match="takes an nn.Module, not function; for a function"):
        quartet.compile(lambda x: x)
    with pytest.raises(TypeError, match="what torch.compile returned"):
        quartet.compile(torch.compile(MLP(), backend="quartet"))


def test_what_dynamo_skips():
    assert is_skipped(nn.Linear(2, 2)) and is_skipped(nn.Sequential(MLP())) and not is_skipped(MLP())


@pytest.mark.parametrize(("call", "said"), [
    ("nn.Sequential(nn.Linear(8, 8)).compile(backend='quartet')", True), ("Own().compile(backend='quartet')", False),
    ("torch.compile(alone(nn.Sequential(nn.Linear(8, 8))), backend='quartet')", True),
    ("torch.compile(alone(Own()), backend='quartet')", False),
    ("torch.compile(nn.Sequential(nn.Linear(8, 8)), backend='quartet')", False),
    ("__import__('quartet').compile(nn.Sequential(nn.Linear(8, 8)))", False),
    ("__import__('quartet').compile(alone(nn.Sequential(nn.Linear(8, 8))))", False),
])
def test_a_compile_that_does_nothing_says_so(call, said):
    """The first use of the backend in a process, by its name alone; ``alone``: in DistributedDataParallel."""
    code = f"""
import torch, warnings
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return x
def alone(model):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {call}
print([(w.filename, str(w.message)) for w in caught if "uncompiled" in str(w.message)])
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("quartet.compile(model)" in made.stdout and "<string>" in made.stdout) == said, made.stdout
    assert (made.stdout.strip() == "[]") != said, made.stdout


class Left(nn.Module):
    """Dynamo leaves the forward to Python: it cannot go on inside of ``try``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        try:
            torch._dynamo.graph_break()
            return self.inner(x)
        finally:
            pass


def step_of(model, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(32, 64)).sum().backward()
        optimizer.step()


def test_a_model_of_which_there_is_no_graph_is_told_of_once(graphs):
    model = quartet.compile(Left(nn.Linear(64, 64)), "fp8")
    with pytest.warns(UserWarning, match=r"no graph of Left is compiled.*graph_break.*test_compile\.py:\d+\)") as told:
        step_of(model, steps=3)
    assert graphs == [] and len([w for w in told if "no graph of" in str(w.message)]) == 1


def test_strict_refuses_to_step_a_model_of_which_there_is_no_graph():
    model = quartet.compile(Left(nn.Linear(64, 64)), "fp8", strict=True)
    with pytest.raises(UnsupportedMatmul, match="strict=True, and no graph of Left"):
        step_of(model)


@pytest.mark.parametrize(("build", "policy", "held"), [
    (MLP, "fp8", [{"up", "down"}]), (lambda: Left(MLP()), "fp8", [{"inner.up", "inner.down"}]),
    (lambda: Left(nn.Linear(64, 64)), "bf16", [])], ids=["whole", "part", "not to be quantised"])
def test_where_there_is_a_graph_or_nothing_to_quantise_nothing_is_said(graphs, recwarn, build, policy, held):
    model = quartet.compile(build(), policy)
    step_of(model)
    assert not [w for w in recwarn if "no graph of" in str(w.message)] and graphs == held


@pytest.mark.parametrize("strict", [False, True])
def test_what_comes_after_the_limit_of_compilations_is_told_of_once(graphs, strict):
    model, said = quartet.compile(MLP(), "fp8", dynamic=False, strict=strict), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (32, 33, 34, 35):
            model(torch.randn(rows, 64)).sum().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    optimizer.step()
                except UnsupportedMatmul as error:
                    said.append((rows, f"refused: {error}"))
            said += [(rows, str(w.message)) for w in caught]
    said = [(rows, text) for rows, text in said if "run unquantised from now on" in text]
    assert len(graphs) == 2 and [rows for rows, _ in said] == [34]
    assert said[0][1].startswith("refused: strict=True") == strict


def under_a_mode(model, x):
    with FlopCounterMode(display=False):
        return model(x)


def vectorised(model, x):
    return torch.func.vmap(model)(x[None])


@pytest.mark.parametrize("call", [under_a_mode, vectorised])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("error:quartet")
def test_a_call_that_dynamo_does_not_compile_ends_with_the_step(graphs, call, trained):
    model, x = quartet.compile(MLP(), "quartet"), torch.randn(32, 64)
    step_of(model, steps=trained)
    call(model, x)
    step_of(model)
    quantised, exact = model(x), model.forward(x)
    assert graphs == [{"up", "down"}] and not torch.equal(quantised, exact)


@pytest.mark.parametrize("call", [under_a_mode, vectorised])
def test_a_call_that_dynamo_does_not_compile_ends_with_the_step_behind_torch_compile(graphs, call):
    model = MLP()
    compiled, x = torch.compile(model, backend="quartet", options={"policy": "quartet"}), torch.randn(32, 64)
    before = compiled(x)
    call(compiled, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before.sum().backward()
    optimizer.step()
    assert torch.equal(compiled(x), before) and len(graphs) == 1


@pytest.mark.filterwarnings("error:quartet")
def test_equal_models_that_share_a_graph_and_steps_without_a_call_are_not_told_of(graphs):
    models = [quartet.compile(MLP(), "quartet", strict=True) for _ in range(2)]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.step()
    for model in models:
        step_of(model, steps=3)
    assert graphs == [{"up", "down"}]


def test_a_graph_that_cannot_be_compiled_is_not_tried_again_after_each_step(monkeypatch):
    tried = []

    def refuse(names, *_):
        tried.append(names)
        raise UnsupportedMatmul("refused")

    monkeypatch.setattr("quartet.backend._say", lambda judge, target, names, *_: refuse(names))
    with torch._dynamo.config.patch(suppress_errors=True):
        step_of(quartet.compile(MLP(), "quartet"), steps=3)
    assert len(tried) == 1
