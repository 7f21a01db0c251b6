"""What is kept by a joint graph alone against what is kept when it really is divided."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import Backend
from models import Llama, data, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.passes.residuals import trial
from quartet.passes.residuals.boundary import shown_roots, stored_bytes
from quartet.runtime import compat
from quartet.runtime.capture import Capture


class Gated(nn.Module):
    """Two layers, of whose first result so much is dropped."""

    def __init__(self, p=0.0):
        super().__init__()
        self.up, self.down, self.p = nn.Linear(64, 96), nn.Linear(96, 64), p

    def forward(self, x):
        y = F.gelu(self.up(x))
        return x + self.down(F.dropout(y, self.p) if self.p else y)


class Half(nn.Module):
    """Two of them, the second of which is computed again."""

    def __init__(self, p=0.0):
        super().__init__()
        self.first, self.second = Gated(), Gated(p)

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=False)


class Asserts(nn.Module):
    """Looks at what backward reads, for an effect that is forward's; an input is a result too."""

    def __init__(self):
        super().__init__()
        self.net = Gated()

    def forward(self, x):
        y = self.net(x).exp()
        torch._assert_async((y > 0).all())
        return y.logsumexp(-1, keepdim=True) * y, x


CASES = {
    "llama": (Llama, tokens, {}), "dropout": (partial(Gated, 0.2), data(80, 64, grad=True), {}),
    "asserts": (Asserts, data(80, 64, grad=True), {}),
    "lengths": (Gated, data(80, 64, grad=True), {"dynamic": True}),
    "checkpointed": (Half, data(80, 64, grad=True), {}),
    "drawn again": (partial(Half, 0.2), data(80, 64, grad=True), {}),
}


def everything(divided):
    """What is known of a divided graph, by names."""
    own = [(s.root.name, s.source.name, [p.made.name for p in s.parts], stored_bytes(s))
           for s in trial.own_storages(divided)]
    seen = divided.seen
    read = {kept.made.name: ({n.name for n in seen.readers(kept.read) if n.op != "output"},
                             {n.name for n in seen.recomputed(kept.read)}) for kept in divided.kept}
    return own, [kept.made.name for kept in divided.kept], {n.name for n in shown_roots(divided.shown)}, read


def compiled(name, memory="least"):
    """Records of what is kept of a case."""
    torch._dynamo.reset()
    make, inputs, how = CASES[name]
    torch.manual_seed(0)
    saved, options = [], Options.parse(options={"policy": "quartet", "memory": memory})

    def compile(backend, gm, example):
        return compile_graph(gm, example, options, inner_compile=Capture(), collect_saved=saved.extend)

    torch.compile(make(), backend=Backend(compile, Capture()), **how)(*inputs())
    return saved


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_a_division_leaves(monkeypatch, name):
    answer, pairs = trial.Trial.divided, []

    def divided(self):
        other = trial.Trial(trial.copy_of(self.gm), self.config)
        pairs.append((answer(self), trial.Division(*other._ask(self.config.partition), other._outputs)))
        return pairs[-1][0]

    monkeypatch.setattr(trial.Trial, "divided", divided)
    compiled(name)
    assert len(pairs) == 3  # without us, with all products kept, with all of them again
    for found, expected in pairs:
        assert isinstance(found, trial.Division if name == "drawn again" else trial.Cut)
        assert everything(found) == everything(expected)
        assert found.kept


@pytest.mark.parametrize("name", ["dropout", "checkpointed"])
def test_where_the_partitioner_is_another_one_the_copies_are_divided(monkeypatch, name):
    expected = compiled(name, 0.6)
    monkeypatch.setattr(compat, "with_steps", lambda partition, **steps: None)
    assert compiled(name, 0.6) == expected
