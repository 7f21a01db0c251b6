"""Which class a layer has: output heads and gates by structure, in training and evaluation, with and without a loss."""

import pytest
import torch
import torch.nn.functional as F
from harness import compile_eager
from models import Attention, Block, LoRA, data
from torch import nn


def classes(model, *inputs, grad=True, dynamic=None):
    """Module name → op class, of one forward through however many graphs."""
    compiled, backend = compile_eager(model, "bf16", fullgraph=False, dynamic=dynamic)
    with torch.set_grad_enabled(grad):
        compiled(*inputs)
    return {r.fqn: r.op_class for r in backend.records if r.role == "fprop" and r.op_class in (
        "linear", "lm_head", "router")}


def draw(*shape):
    return data(*shape)()[0]


class Ends(nn.Module):
    """A body, and a last layer under a name of any kind."""

    def __init__(self, path="out", width=40):
        super().__init__()
        self.body, self.path = nn.Linear(64, 64), path
        *parents, name = path.split(".")
        at = self
        for parent in parents:
            at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.add_module(name, nn.Linear(64, width))

    def forward(self, x, loss=None):
        y = self.get_submodule(self.path)(self.body(x).relu())
        return y if loss is None else loss(y)


def labels(y):
    return torch.ones(y.shape[:-1], dtype=torch.long)


LOSSES = {
    "none": None,
    "cross entropy": lambda y: F.cross_entropy(y.mT, labels(y)),
    "masked cross entropy": lambda y: (F.cross_entropy(y.mT, labels(y), reduction="none") * labels(y).tril()).mean(),
    "of every class alone": lambda y: F.binary_cross_entropy_with_logits(y, torch.ones_like(y)),
    "squares": lambda y: F.mse_loss(y, torch.ones_like(y)),
    "of alignments": lambda y: F.ctc_loss(y.log_softmax(-1).transpose(0, 1), labels(y)[:, :3], *(
        torch.full((len(y),), size) for size in (y.shape[1], 3))),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_is_one_whatever_the_loss_is(loss, grad):
    assert classes(Ends(), draw(4, 20, 64), LOSSES[loss], grad=grad) == {"body": "linear", "out": "lm_head"}


@pytest.mark.parametrize("path", ["lm_head", "score", "qa_outputs", "classifier", "model.head", "logits", "output"])
def test_a_head_that_is_as_wide_as_the_model_is_told_by_its_name(path):
    assert classes(Ends(path, 64), draw(4, 20, 64)) == {"body": "linear", path: "lm_head"}
    assert classes(Ends("proj", 64), draw(4, 20, 64)) == {"body": "linear", "proj": "linear"}


@pytest.mark.parametrize("path", ["fc", "head.fc", "classifier.6", "mlp_head", "a.b"])
def test_a_head_has_any_name(path):
    assert classes(Ends(path, 10), draw(40, 64)) == {"body": "linear", path: "lm_head"}


class Two(nn.Module):
    """Two heads, such as a policy and its value, of which ``wrap`` makes the results."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.policy, self.value, self.wrap = nn.Linear(64, 64), nn.Linear(64, 6), nn.Linear(64, 1), wrap

    def forward(self, x):
        h = self.body(x).tanh()
        return self.wrap(self.policy(h), self.value(h))


@pytest.mark.parametrize("wrap", [
    lambda p, v: (p, v), lambda p, v: p.softmax(-1).sum() + v.square().mean(), lambda p, v: torch.cat((p, v), -1),
    lambda p, v: {"action": p.argmax(-1), "p": p.log_softmax(-1), "value": v.squeeze(-1)}])
def test_a_model_has_several_heads(wrap):
    assert classes(Two(wrap), draw(40, 64)) == {"body": "linear", "policy": "lm_head", "value": "lm_head"}


def test_a_head_beside_a_projection_as_wide_as_the_model():
    class Segmenter(Two):
        def __init__(self):
            super().__init__(lambda p, v: (p, v @ v.mT))
            self.value = nn.Linear(64, 64)

    assert classes(Segmenter(), draw(40, 64)) == {"body": "linear", "policy": "lm_head", "value": "linear"}


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 64, 3), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_a_head_behind_convolutions():
    assert classes(Convolutional(), draw(4, 3, 9, 9)) == {"fc": "lm_head"}


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mu, self.log_width = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(96, 32)
        self.down, self.out = nn.Linear(32, 96), nn.Linear(96, 64)

    def forward(self, x):
        h = self.up(x).relu()
        mu, log_width = self.mu(h), self.log_width(h)
        return self.out(self.down(mu + log_width.exp()).relu()), mu, log_width


class Cached(nn.Module):
    """Attention with fewer heads of keys and values, which it returns, in one layer or two."""

    def __init__(self, fused, breaks=False):
        super().__init__()
        self.fused, self.breaks, self.q, self.o = fused, breaks, nn.Linear(64, 64), nn.Linear(64, 64)
        self.kv = nn.ModuleList([nn.Linear(64, 64)] if fused else [nn.Linear(64, 32), nn.Linear(64, 32)])

    def forward(self, x):
        k, v = self.kv[0](x).chunk(2, -1) if self.fused else (layer(x) for layer in self.kv)
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (self.q(x), k, v))
        if self.breaks:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)))
        return self.o(y.transpose(1, 2).flatten(2)), k, v


class Packed(nn.Module):
    """Queries, keys and values of one layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).split([64, 32, 32], -1)
        torch._dynamo.graph_break()
        return self.o(q + k.repeat(1, 1, 2) + v.repeat(1, 1, 2))


class Broken(nn.Module):
    """Layers with a graph break after each: a hidden one that widens, one that narrows again, and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 10)

    def forward(self, x):
        h = self.up(x).relu()
        torch._dynamo.graph_break()
        h = self.down(h)
        torch._dynamo.graph_break()
        return self.out(h)


class Recurrent(nn.Module):
    """What it returns is read again by the first layer, as of every model that predicts what it has read."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("model", [
    Autoencoder, lambda: Cached(False), lambda: Cached(True), Attention, Block, Recurrent,
    lambda: nn.Linear(64, 40), lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))])
@pytest.mark.parametrize("grad", [True, False])
def test_no_head_where_a_layer_reads_what_it_computes(model, grad):
    assert set(classes(model(), draw(2, 20, 64), grad=grad).values()) == {"linear"}


def test_no_head_of_an_adapter():
    assert set(classes(LoRA(), draw(2, 20, 64)).values()) == {"linear"}


@pytest.mark.parametrize("model", [lambda: Cached(False, True), lambda: Cached(True, True), Packed])
def test_attention_that_a_graph_break_parts_has_no_head(model):
    assert set(classes(model(), draw(2, 20, 64)).values()) == {"linear"}


def test_heads_of_a_model_in_several_graphs():
    assert classes(Broken(), draw(40, 64)) == {"up": "linear", "down": "linear", "out": "lm_head"}


class Tied(nn.Module):
    """A head that has its table's weight in another graph, and as many outputs as a layer reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(96, 64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.out = nn.Linear(64, 96, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        h = self.down(self.up(self.embed(ids)).relu())
        torch._dynamo.graph_break()
        return self.out(h)


@pytest.mark.parametrize("make, given, expected", [
    (Ends, draw(4, 20, 64), {"body": "linear", "out": "lm_head"}),
    (Tied, torch.randint(96, (2, 20)), {"up": "linear", "down": "linear", "out": "lm_head"}),
    (lambda: nn.Linear(64, 40), draw(40, 64), {"": "linear"})])
def test_a_layer_that_is_compiled_by_itself_is_what_it_is_in_its_model(make, given, expected):
    """As accelerate's ``compile_regions`` compiles what no block holds."""
    for name, op_class in expected.items():
        model = make()
        compiled, backend = compile_eager(model.get_submodule(name), "bf16", fullgraph=False)
        if name:
            setattr(model, name, compiled)
        (model if name else compiled)(given)
        assert [r.op_class for r in backend.records if r.role == "fprop"] == [op_class]


class Mixing(nn.Module):
    """As RWKV's attention, whose last layer is called what the head of Llama is."""

    def __init__(self):
        super().__init__()
        self.value, self.output = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.output(self.value(x).tanh())


def test_a_part_of_a_block_that_is_compiled_by_itself_has_no_head_by_name():
    model, (compiled, backend) = nn.Sequential(Mixing(), Mixing()), compile_eager(Mixing(), "bf16")
    model[0] = compiled
    model(draw(40, 64))
    assert {r.fqn: r.op_class for r in backend.records if r.role == "fprop"} == {"value": "linear", "output": "linear"}


def test_a_head_has_its_tables_weight_in_another_graph():
    assert classes(Tied(), torch.randint(96, (2, 20))) == {"up": "linear", "down": "linear", "out": "lm_head"}


class Mixture(nn.Module):
    """Experts of whose gate ``choose`` makes the weights; ``stacked``: their results are weighed in one product."""

    def __init__(self, choose, combine):
        super().__init__()
        self.pre, self.gate = nn.Linear(64, 64), nn.Linear(64, 4, bias=False)
        self.experts, self.choose, self.combine = nn.ModuleList(nn.Linear(64, 64) for _ in range(4)), choose, combine

    def forward(self, x):
        x = torch.tanh(self.pre(x))
        return self.combine(self.choose(self.gate(x)), [expert(x) for expert in self.experts])


def one_hot_of_argmax(scores):
    p = scores.softmax(-1)
    i = p.argmax(-1)
    return p.gather(-1, i[..., None]) * F.one_hot(i, p.shape[-1])


def of_the_largest(scores):
    value, i = scores.softmax(-1).max(-1)
    return value[..., None] * F.one_hot(i, scores.shape[-1])


def above_a_half(scores):
    p = scores.sigmoid()
    return p * (p > 0.5)


CHOICES = {
    "softmax": lambda s: s.softmax(-1), "sigmoid": torch.sigmoid, "rectified": torch.relu, "argmax": one_hot_of_argmax,
    "max": of_the_largest, "threshold": above_a_half, "two": lambda s: s.softmax(-1).topk(2, -1)[0].repeat(1, 2),
    "gumbel": lambda s: F.gumbel_softmax(s, hard=True), "scores alone": lambda s: (s / 4 + 0.1).exp(),
}
COMBINATIONS = {
    "columns": lambda p, y: sum(e * p[..., i:i + 1] for i, e in enumerate(y)),
    "selected": lambda p, y: sum(p[..., i, None] * e for i, e in enumerate(y)),
    "stacked": lambda p, y: (torch.stack(y, -2) * p[..., None]).sum(-2),
    "einsum": lambda p, y: torch.einsum("te,ted->td", p, torch.stack(y, -2)),
    "where": lambda p, y: sum(torch.where(p[..., i, None] > 0.3, e, 0) for i, e in enumerate(y)),
    "gather": lambda p, y: torch.stack(y, -2).gather(-2, p.argmax(-1)[:, None, None].expand(-1, 1, 64)).squeeze(-2),
    "index": lambda p, y: torch.stack(y, -2)[torch.arange(len(p)), p.argmax(-1)],
}
MIXTURE = {"pre": "linear", "gate": "router", **{f"experts.{i}": "linear" for i in range(4)}}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_gate_is_a_router_however_it_chooses(choice, grad):
    assert classes(Mixture(CHOICES[choice], COMBINATIONS["columns"]), draw(40, 64), grad=grad) == MIXTURE


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_gate_is_a_router_however_its_choice_is_used(combination):
    assert classes(Mixture(CHOICES["softmax"], COMBINATIONS[combination]), draw(40, 64)) == MIXTURE


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("combination", ["columns", "einsum", "index"])
def test_a_gate_is_a_router_whatever_sizes_are_symbolic(combination, dynamic):
    class Folded(Mixture):
        def forward(self, x):
            x = self.embed(x)
            return x + super().forward(x.reshape(-1, x.shape[-1])).view(*x.shape)

    model = Folded(CHOICES["softmax"], COMBINATIONS[combination])
    model.embed = nn.Embedding(16, 64)
    assert classes(model, torch.randint(0, 16, (2, 20)), dynamic=dynamic) == MIXTURE


class Shared(nn.Module):
    """An expert of all tokens, as much of it as one score says."""

    def __init__(self):
        super().__init__()
        self.gate, self.expert, self.out = nn.Linear(64, 1), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(self.gate(x).sigmoid() * self.expert(x))


class Dispatched(nn.Module):
    """Weights that the choice picks from a stack, for each token."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.Parameter(torch.randn(4, 64, 64) / 8)
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        return self.out(torch.bmm(x[:, None], self.experts[p.argmax(-1)])[:, 0] * p.amax(-1, keepdim=True))


class Pooled(nn.Module):
    """Tokens weighed by few scores each in a product: pooling by attention, or additive attention."""

    def __init__(self, additive, scores=1):
        super().__init__()
        self.pre, self.gate, self.out = nn.Linear(64, 64), nn.Linear(64, scores), nn.Linear(64, 64)
        self.additive = additive

    def forward(self, x):
        h = self.pre(x).relu()
        if self.additive:
            return self.out(self.gate(torch.tanh(h[:, :, None] + h[:, None])).squeeze(-1).softmax(-1) @ h)
        return self.out(self.gate(h).softmax(1).mT @ h)


@pytest.mark.parametrize("model", [lambda: Pooled(False), lambda: Pooled(False, 8), lambda: Pooled(True)])
def test_scores_that_weigh_tokens_in_a_product_are_a_routers(model):
    assert classes(model(), draw(2, 20, 64)) == {"pre": "linear", "gate": "router", "out": "linear"}


@pytest.mark.parametrize("lookup", [lambda table, i: table[i], lambda table, i: F.embedding(i, table),
                                    lambda table, i: table.index_select(0, i)])
def test_a_codebook_is_multiplied_as_a_head_is(lookup):
    """Its nearest row is looked up, whatever the number of rows."""
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre, self.out, self.codes = nn.Linear(64, 64), nn.Linear(64, 64), nn.Parameter(torch.randn(96, 64))

        def forward(self, x):
            h = self.pre(x)
            distances = self.codes.square().sum(-1) - 2 * h @ self.codes.T
            return self.out(h + (lookup(self.codes, distances.argmin(-1)) - h).detach())

    assert classes(Quantised(), draw(40, 64)) == {"pre": "linear", "codes": "lm_head", "out": "linear"}


@pytest.mark.parametrize("model", [Shared, Dispatched])
def test_other_gates(model):
    assert classes(model(), draw(40, 64)) == {"gate": "router", **{
        name: "linear" for name in ("expert", "out") if name in dict(model().named_modules())}}


class Elementwise(nn.Module):
    """Gates of full width, and a narrow layer that makes one of its input."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.squeeze, self.excite, self.whole = nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        x = x * self.excite(self.squeeze(x).relu()).sigmoid()
        return x * torch.sigmoid(self.whole(x))


class Linearised(nn.Module):
    """Attention whose queries and keys pass an activation instead of a softmax, of fewer features than it reads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        q, k = (F.elu(t).add(1).unflatten(-1, (2, 16)).transpose(1, 2) for t in (self.q(x), self.k(x)))
        v = self.v(x).unflatten(-1, (2, 32)).transpose(1, 2)
        return self.o((q @ (k.mT @ v)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("model", [Elementwise, Linearised, lambda: Cached(False), Block, LoRA])
def test_no_gate_where_no_score_weighs_a_vector(model):
    assert "router" not in classes(model(), draw(2, 20, 64)).values()


class Relative(nn.Module):
    """Attention whose scores have a product with the vector of each distance (Shaw et al., arXiv 1803.02155)."""

    def __init__(self, lookup):
        super().__init__()
        self.embed, self.q, self.k = nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.table, self.out, self.lookup = nn.Parameter(torch.randn(63, 64) / 8), nn.Linear(64, 64), lookup

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        q, k, at = self.q(x), self.k(x), torch.arange(x.shape[1])
        vectors = self.lookup(self.table, at[:, None] - at[None] + 31)
        scores = torch.softmax(q @ k.mT + torch.einsum("btd,tsd->bts", q, vectors), -1)
        return torch.tanh(self.out(scores @ x)).square()


@pytest.mark.parametrize("size", [(1, 8, 64), (8, 64)])
def test_learned_queries_are_no_experts(size):
    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre, self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(5))
            self.latent = nn.Parameter(torch.randn(size))

        def forward(self, x):
            x, latent = self.pre(x).relu(), self.latent.expand(len(x), 8, 64)
            q, k, v = (layer(t).unflatten(-1, (2, 32)).transpose(1, 2) for layer, t in (
                (self.q, latent), (self.k, x), (self.v, x)))
            return self.out(((q @ k.mT).tanh().softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)

    compiled, backend = compile_eager(Latent(), "bf16")
    compiled(draw(2, 32, 64))
    found = [record.op_class for record in backend.records if record.role == "fprop"]
    assert "attention_qk" in found and "attention_pv" in found and "grouped" not in found, found


@pytest.mark.parametrize("lookup", [
    lambda table, at: table[at],
    lambda table, at: nn.functional.embedding(at, table),
    lambda table, at: table.index_select(0, at.flatten()).unflatten(0, at.shape),
], ids=["index", "embedding", "index_select"])
def test_vectors_of_relative_positions_are_no_experts(lookup):
    compiled, backend = compile_eager(Relative(lookup), "bf16")
    compiled(draw(2, 32, 48))
    found = [record.op_class for record in backend.records if record.role == "fprop"]
    assert found.count("attention_qk") == 2 and found.count("attention_pv") == 1 and "grouped" not in found, found
