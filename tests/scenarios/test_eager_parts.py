"""explain and strict see the layers that no graph holds: their rows, why, and their share of the FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from harness import compile_eager
from torch import nn

from quartet import Policy, explain
from quartet.passes.plan.plan import UnsupportedMatmul

WIDTH = 32


class Around(nn.Module):
    """A linear layer, something else and a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Disabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    @torch.compiler.disable
    def forward(self, x):
        return self.fc(x)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class Attention(nn.Module):
    @torch.compiler.disable
    def forward(self, x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Weights(nn.Module):
    """Parameters that no layer of torch's multiplies, one of them by autocast's cast of it."""

    def __init__(self):
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(4, 1, WIDTH))

    @torch.compiler.disable
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ self.w).float() + self.bias[:, :1]


INNER = {
    "lstm": (lambda: Recurrent(nn.LSTM), {"inner.rnn.weight_ih_l0", "inner.rnn.weight_hh_l0"}, "RNN, GRU, or LSTM"),
    "gru": (lambda: Recurrent(nn.GRU), {"inner.rnn.weight_ih_l0", "inner.rnn.weight_hh_l0"}, "RNN, GRU, or LSTM"),
    "disable": (Disabled, {"inner.fc"}, "torch.compiler.disable"),
    "loop": (Loop, {f"inner.layers.{i}" for i in range(3)}, "graph_break"),
    "weights": (Weights, {"inner.w"}, "torch.compiler.disable"),
}


def x(*size):
    return torch.randn(*(size or (4, 16, WIDTH)))


def rows(report):
    return {r.fqn for r in report}


@pytest.mark.parametrize("name", INNER)
def test_a_layer_that_no_graph_holds_has_rows_that_say_why_and_where(name):
    make, layers, reason = INNER[name]
    report = explain(Around(make()), x(), options={"policy": "quartet"})
    assert layers | {"first", "last"} <= rows(report)
    for r in (r for r in report if r.fqn in layers):
        assert not r.lowered and reason in r.reason and r.recipe == "quartet"
        assert f"{__file__.rpartition('/')[2]}:" in r.reason, r.reason
    roles = {role for r in report if r.fqn in layers for role in [r.role]}
    assert roles == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize("name", INNER)
def test_strict_refuses_what_the_policy_quantises_in_eager_and_nothing_else(name):
    make, layers, _ = INNER[name]
    with pytest.raises(UnsupportedMatmul) as error:
        explain(Around(make()), x(), options={"policy": Policy("quartet").on("first", None), "strict": True})
    assert all(layer in str(error.value) for layer in layers)
    assert len(explain(Around(make()), x(), options={"policy": "bf16", "strict": True}))


def test_shares_are_of_all_flops():
    report = explain(Around(Disabled()), x(), options={"policy": Policy("quartet").on("first", "quartet")})
    assert report.flops_share("fprop") == pytest.approx(2 / 3)
    calls = next(r for r in explain(Around(nn.Sequential(*[Disabled()] * 3)), x(), options={"policy": "quartet"})
                 if r.fqn == "inner.0.fc" and r.role == "fprop")
    assert calls.flops == 3 * 2 * 64 * WIDTH * WIDTH


def test_products_of_activations_in_eager_are_counted():
    report = explain(Around(Attention()), x(), options={"policy": "quartet"})
    found = {(r.op_class, r.role): (r.fqn, r.m, r.n, r.k, r.batch) for r in report if r.op_class.startswith("att")}
    assert found["attention_qk", "fprop"] == ("inner", 16, 16, WIDTH, 4)
    assert found["attention_pv", "dgrad"] == ("inner", 16, 16, WIDTH, 4)


def test_a_bilinear_layer_has_rows():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.out = nn.Bilinear(WIDTH, 16, 48), nn.Linear(48, WIDTH)

        def forward(self, a, b):
            return self.out(self.both(a, b))

    a, b = x(8, WIDTH).requires_grad_(), x(8, 16)
    found = {r.role: (r.m, r.n, r.k) for r in explain(Model(), a, b, options={"policy": "quartet"}) if r.fqn == "both"}
    assert found == {"fprop": (8, 48, WIDTH * 16), "dgrad": (8, WIDTH, 48 * 16), "wgrad": (48, WIDTH * 16, 8)}
    with pytest.raises(Exception, match="strict=True, and both .*three tensors"):
        explain(Model(), a, b, options={"policy": "quartet", "strict": True})


def test_a_layer_that_does_not_run_is_a_note_and_not_refused():
    class Model(Around):
        def __init__(self):
            super().__init__(nn.Identity())
            self.idle = nn.Linear(WIDTH, WIDTH)

    report = explain(Model(), x(), options={"policy": "quartet", "strict": True})
    assert "idle" not in rows(report) and any("idle" in note for note in report.notes)


def test_what_data_parallelism_wraps_is_no_other_layer():
    report = explain(nn.DataParallel(Around(Disabled())), x(), options={"policy": "quartet"})
    assert {r.fqn for r in report if "eager" in r.reason} == {"inner.fc"}


def test_a_training_step_is_explained_and_leaves_model_and_optimizer_as_they_were():
    model = Around(nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def step(batch):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    report = explain(step, x(), options={"policy": "quartet"})
    assert {"first", "last"} <= rows(report) and not any("eager" in r.reason for r in report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


def test_models_that_share_code_are_explained_with_their_own_sizes():
    for width in (32, 64):
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        report = explain(model, torch.randn(width, width), options={"policy": "quartet"})
        assert all(isinstance(r.m, int) and r.flops for r in report)


def strictly(model, policy="quartet"):
    torch._dynamo.reset()
    compiled, _ = compile_eager(model, policy, fullgraph=False, strict=True)
    for _ in range(3):
        compiled(x()).sum().backward()


@pytest.mark.parametrize("name", ["disable", "lstm"])
def test_strict_refuses_them_too_when_the_model_has_run_once(name):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.inner = nn.Linear(WIDTH, WIDTH), INNER[name][0]()

        def forward(self, x):
            return self.second(self.before(x).relu())

        @torch.compiler.disable
        def second(self, x):
            return self.inner(x)

    with pytest.raises(UnsupportedMatmul, match="no graph holds inner") as error:
        strictly(Outer())
    assert all(layer in str(error.value) for layer in INNER[name][1])
    strictly(Outer(), Policy("quartet").on("inner.*", None))


def test_strict_lets_layers_be_that_are_in_another_graph_or_never_run():
    class Model(Around):
        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.last(x)

    strictly(Model(nn.Identity()))
    idle = Around(nn.Identity())
    idle.never = nn.Linear(WIDTH, WIDTH)
    strictly(idle)
