"""What torchao's own tests ask of its low-bit optimizers, asked of ours and, where a CPU can answer, of theirs, which
shows that the questions can be answered: ``AdamW8bit``, ``AdamWFp8``, their Adams and ``_AdamW`` of torchao.

==================================================  ===================================================================
in torchao's ``test/test_low_bit_optim.py``         here
==================================================  ===================================================================
test_quantize_8bit_with_qmap_correctness, _compile  ``test_peers.py``: the dynamic map is bitsandbytes' and torchao's;
                                                    ``test_kernels.py``: C++ and Triton kernels give its bits
test_bf16_stochastic_round                          test_stochastic_rounding_keeps_the_mean
test_optim_smoke                                    test_a_saved_run_goes_on
test_optim_default_dtype_bf16                       test_a_default_dtype_of_bf16_changes_nothing
test_param_groups                                   test_groups_step_at_their_own_rates
test_subclass_slice                                 test_rows_of_states_are_states_of_rows
test_optim_8bit_correctness (bitsandbytes, a GPU)   ``test_peers.py``: torchao trains to the same weights
test_optim_bf16_stochastic_round_correctness        test_bf16_weights_train_as_fp32_ones_only_if_rounded_stochastically
test_fsdp2                                          test_fsdp2_trains_like_one_process_and_goes_through_a_checkpoint
test_uneven_shard                                   test_rows_that_ranks_share_unevenly
==================================================  ===================================================================

Without a counterpart are 4-bit states and ``CPUOffloadOptimizer``, which do not exist here.
"""

import copy
import sys
import warnings
from pathlib import Path

import gloo
import pytest
import torch
from torch import nn

from quartet import optim

sys.path.insert(0, str(Path(__file__).parent))

import optim_workers as workers  # noqa: E402

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


@pytest.fixture
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_dtype_of_bf16_changes_nothing(name, bf16_by_default):
    """Tensors that an optimizer makes for itself must not follow the default; torchao's count of steps does, so
    that in an eager step its second bias correction is zero."""
    net = mlp(torch.bfloat16)
    assert net[0].weight.dtype is torch.bfloat16
    twin, x = copy.deepcopy(net), torch.randn(3, 4, 32)
    optimizers = [OURS[name](net.parameters())]
    for batch in x:
        descend(net, optimizers[0], batch)
    torch.set_default_dtype(torch.float32)
    optimizers.append(OURS[name](twin.parameters()))
    for batch in x:
        descend(twin, optimizers[1], batch)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        states = [optimizer.state[w] for optimizer, w in zip(optimizers, (p, q), strict=True)]
        assert [v.dtype for v in states[0].values()] == [v.dtype for v in states[1].values()]


@pytest.mark.parametrize("name", NAMES)
def test_groups_step_at_their_own_rates(make, name):
    """The first step of Adam is the learning rate of the group, for each element with a gradient."""
    net, rates = mlp(), (1e-4, 1e-2, 1e-3)
    optimizer = make(name, [{"params": net[0].parameters(), "lr": rates[0]},
                            {"params": [net[2].weight], "lr": rates[1], "weight_decay": 0.0}])
    optimizer.add_param_group({"params": [net[2].bias], "lr": rates[2], "weight_decay": 0.0})
    before = [p.detach().clone() for p in net.parameters()]
    descend(net, optimizer, torch.randn(64, 32))
    moved = [(p - q).abs().max().item() for p, q in zip(net.parameters(), before, strict=True)]
    for got, rate in zip(moved, (rates[0], rates[0], rates[1], rates[2]), strict=True):
        assert got == pytest.approx(rate, rel=0.02)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the workers returned, by name, one entry a rank."""
    folder = tmp_path_factory.mktemp("suite")
    return {name: gloo.run(workers.__file__, name, folder) for name in ("suite", "uneven")}


@gloo.available
@pytest.mark.parametrize("case", workers.SUITE)
def test_fsdp2_trains_like_one_process_and_goes_through_a_checkpoint(case, ranks):
    for rank in ranks["suite"]:
        found = rank[case]
        for whole, sharded in found["losses"]:
            assert sharded == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(*found["moments"], rtol=1e-2, atol=1e-6)
        saved, resumed = found["states"]
        assert len(saved) == len(resumed) == 6
        for a, b in zip(saved, resumed, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@gloo.available
@pytest.mark.parametrize("case", workers.SUITE)
def test_rows_that_ranks_share_unevenly(case, ranks):
    for rank in ranks["uneven"]:
        assert rank[case].shape == (33, 512) and (rank[case] > 1e-4).any(1).all()


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
