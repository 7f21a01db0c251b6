"""A user's own joint pass, explain, and models that the user compiled."""

import pytest
import torch
from harness import ALL, compile_eager, step
from models import MLP, Llama, data, tokens
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import quartet
from quartet.backend import make_pipeline
from quartet.options import Options


class Negate(CustomGraphPass):
    """Turns gelu's factor 0.5 into −0.5, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph):
        self.calls += 1
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            if node.args[1] == 0.5:
                node.args = (node.args[0], -0.5)

    def uuid(self):
        return "negate"


@pytest.mark.parametrize("given", ["config", "options", "list", "function"])
def test_the_users_joint_pass_runs_too(given):
    model, (x,) = MLP(), data(40, 64)()
    expected = compile_eager(model)[0](x)
    torch._dynamo.reset()
    own = Negate()
    value = {"list": [own], "function": own.__call__}.get(given, own)
    options = {"joint_custom_pre_pass": value} if given == "options" else {}
    with config.patch({} if options else {"joint_custom_pre_pass": value}):
        compiled, backend = compile_eager(model, **options)
        assert torch.equal(compiled(x), -expected)
    assert own.calls == 1 and set(backend.lowered()) == {"up", "down"}


def test_the_cache_key_holds_the_users_pass():
    gm = torch.fx.symbolic_trace(torch.nn.Identity())

    def key(*passes):
        return make_pipeline(gm, [torch.ones(1)], Options(inductor={"joint_custom_pre_pass": list(passes)})).uuid()

    assert key() and key(Negate()) and key() != key(Negate())
    assert key(lambda graph: None) is None


class Counting(MLP):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(64)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.drop(self.norm(x)))


def test_explain_leaves_no_trace():
    model, (x,) = Counting(), data(40, 64)()
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    report = quartet.explain(model, x)
    assert "up" in str(report) and model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_explain_restores_state_after_an_error():
    model, wrong = Counting(), torch.randn(40, 63)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(Exception, match="[Ss]hape|size|mat1"):
        quartet.explain(model, wrong)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_explain_takes_the_options_of_a_compiled_model():
    model, inputs = Llama(), tokens()
    policy = quartet.Policy("quartet").on("*.down", None)
    compiled = torch.compile(model, backend="quartet", options={"policy": policy})
    records = quartet.explain(compiled, *inputs).records
    assert {r.fqn for r in records if not r.lowered} == {"embed", "layers.0", "layers.0.down", "lm_head"}
    assert len(records) == 24 + 1 + 6  # products with weights, the embedding, those inside of fused attention


def test_explain_does_not_disturb_a_model_in_training():
    model, (x,) = MLP(), data(40, 64)()
    compiled, backend = compile_eager(model)
    before = step(compiled, model, (x,))
    quartet.explain(model, x, options={"policy": "bf16"})
    after = step(compiled, model, (x,))
    assert torch.equal(before[0], after[0]) and backend.calls == 1
    assert backend.lowered() == {"up": frozenset({"fprop", "wgrad"}), "down": ALL}
