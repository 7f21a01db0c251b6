"""What torchao's own tests ask of its low-bit optimizers, asked of ours and of theirs: a run through a file, slices of
states, stochastic rounding, and training beside an optimizer in high precision.

Theirs are ``AdamW8bit``, ``AdamWFp8`` and ``_AdamW`` of torchao; asking both shows that the questions can be answered.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from quartet import optim

OURS = {
    "AdamW8bit": lambda p, **o: optim.AdamW(p, state_format="dynamic", **o),
    "Adam8bit": lambda p, **o: optim.Adam(p, state_format="dynamic", **o),
    "AdamWFp8": lambda p, **o: optim.AdamW(p, state_format="e4m3/256", **o),
    "AdamFp8": lambda p, **o: optim.Adam(p, state_format="e4m3/256", **o),
}
NAMES = ("AdamW8bit", "Adam8bit", "AdamWFp8", "AdamFp8")
OURS["_AdamW"] = lambda p, bf16_stochastic_round, **o: optim.AdamW(p, stochastic_rounding=bf16_stochastic_round, **o)
PAIR = {"AdamW": lambda p, **o: optim.AdamW(p, **o), "Adam": lambda p, **o: optim.Adam(p, **o),
        "AdamW coat": lambda p, **o: optim.AdamW(p, state_format="coat", **o)}


@pytest.fixture(params=["quartet", "torchao"])
def make(request, monkeypatch):
    """A function: the optimizer of a name, ours or theirs, whose step is not compiled here."""
    if request.param == "quartet":
        return lambda name, params, **options: OURS[name](params, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    return lambda name, params, **options: getattr(theirs, name)(params, **options)


def mlp(dtype=torch.float32, width=256, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)).to(dtype)


def descend(net, optimizer, x):
    loss = net(x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def goes_on_through_a_file(make, name, dtype, file):
    net = mlp(dtype)
    optimizer = make(name, net.parameters())
    x = torch.randn(3, 4, 32).to(dtype)
    descend(net, optimizer, x[0])
    torch.save(optimizer.state_dict(), file)
    twin = copy.deepcopy(net)
    resumed = make(name, twin.parameters())
    resumed.load_state_dict(torch.load(file, map_location="cpu"))
    for batch in x[1:]:
        descend(net, optimizer, batch)
        descend(twin, resumed, batch)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_run_goes_on(make, name, dtype, tmp_path):
    goes_on_through_a_file(make, name, dtype, tmp_path / "state.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIR)
def test_a_saved_run_goes_on_in_formats_of_our_own(name, dtype, tmp_path):
    goes_on_through_a_file(lambda name, p: PAIR[name](p), name, dtype, tmp_path / "state.pt")


@pytest.mark.parametrize("form", ["dynamic", "e4m3/256", "coat"])
def test_rows_of_states_are_states_of_rows(form):
    """What resharding a checkpoint does: the upper half of codes and scales is the state of the upper half."""
    whole = nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    half = nn.Parameter(whole.detach()[128:].clone())
    g = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    optimizers = [optim.AdamW([p], state_format=form) for p in (whole, half)]
    for p, grad, optimizer in zip((whole, half), (g, g[128:]), optimizers, strict=True):
        p.grad = grad.clone()
        optimizer.step()
    states = [optimizer.state[p] for p, optimizer in zip((whole, half), optimizers, strict=True)]
    assert torch.equal(whole[128:], half)
    for key in states[0].keys() - {"step"}:
        rows = states[0][key].shape[0] // 2
        assert torch.equal(states[0][key][rows:], states[1][key]), key


def test_stochastic_rounding_keeps_the_mean():
    p = nn.Parameter(torch.zeros(8, 1 << 16, dtype=torch.bfloat16))
    optimizer = optim.SGD([p], lr=0.7231, stochastic_rounding=True, generator=torch.Generator().manual_seed(0))
    g = (torch.rand(8, 1, generator=torch.Generator().manual_seed(0)) * 100).bfloat16()
    p.grad = -g.expand_as(p).contiguous()
    optimizer.step()
    x = 0.7231 * g.double()
    spacing = 2.0 ** (x.log2().floor() - 7)
    assert ((p.double().mean(1, keepdim=True) - x).abs() < 4 * spacing * 0.5 / 256).all()
    assert ((p.double() - x).abs() < spacing).all()


@pytest.mark.parametrize("rounded", [True, False])
def test_bf16_weights_train_as_fp32_ones_only_if_rounded_stochastically(make, rounded):
    """Steps far below the spacing of bfloat16, on one sample: the loss follows that of fp32 weights."""
    net = mlp(width=1024, seed=2024)
    twin = copy.deepcopy(net).bfloat16()
    plain = torch.optim.AdamW(net.parameters(), lr=1e-5)
    optimizer = make("_AdamW", twin.parameters(), lr=1e-5, bf16_stochastic_round=rounded)
    x = torch.randn(4, 32)
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            expected = descend(net, plain, x)
        found = descend(twin, optimizer, x.bfloat16())
    assert (abs(found - expected) < 0.02 * abs(expected) + 0.3) is rounded, (found, expected)
