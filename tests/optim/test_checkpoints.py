"""State dicts: bit for bit, through files, from and to torch.optim."""

import io

import pytest
import torch
from torch import nn

from quartet import optim

FORMATS = ("fp32", "bf16", ("e4m3", "e5m2"), "e4m3/tensor current", "e4m3/256", "dynamic", "coat")
NAMESAKES = [("AdamW", {}), ("Adam", {}), ("SGD", {"momentum": 0.9})]


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 300)).to(dtype)


def train(net, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 1e-2
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}, {"master": "fp16"}])
def test_a_run_resumes_bit_for_bit(form, options):
    net = model(torch.bfloat16)
    optimizer = optim.AdamW(net.parameters(), state_format=form, **options)
    train(net, optimizer, range(3))
    saved = through_a_file({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    other = model(torch.bfloat16)
    other.load_state_dict(saved["model"])
    resumed = optim.AdamW(other.parameters(), state_format=form, **options)
    resumed.load_state_dict(saved["optimizer"])
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert_equal(optimizer.state[p].values(), resumed.state[q].values())
    assert_equal(train(net, optimizer, range(3, 6)), train(other, resumed, range(3, 6)))


def test_a_loaded_state_is_a_copy():
    net = model()
    optimizer = optim.AdamW(net.parameters())
    train(net, optimizer, [0])
    other = model()
    second = optim.AdamW(other.parameters())
    second.load_state_dict(optimizer.state_dict())
    kept = optimizer.state[net[0].weight]["exp_avg"].clone()
    train(other, second, [1])
    assert torch.equal(kept, optimizer.state[net[0].weight]["exp_avg"])


@pytest.mark.parametrize(("name", "options"), NAMESAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_torch_loads_and_goes_back(name, options, dtype):
    net = model(dtype)
    theirs = getattr(torch.optim, name)(net.parameters(), 1e-3, weight_decay=0.03, **options)
    train(net, theirs, range(3))
    ours = getattr(optim, name)(net.parameters(), state_format="e4m3/256", **options)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["weight_decay"] == 0.03 and ours.param_groups[0]["lr"] == 1e-3
    state_name = "momentum_buffer" if name == "SGD" else "exp_avg"
    for p in net.parameters():
        before, after = theirs.state[p][state_name].float(), ours.decoded(p, state_name)
        near = before.abs() > before.abs().max() * 0.1
        torch.testing.assert_close(after[near], before[near], rtol=2**-4 + 1e-6, atol=0)
        assert ours.state[p]["step"] == (1 if name == "SGD" else 3)
    back = getattr(torch.optim, name)(net.parameters(), **options)
    back.load_state_dict(through_a_file(ours.torch_state_dict()))
    train(net, back, [4])
    small = net[0].bias  # kept in fp32, so nothing is lost on the way
    assert torch.equal(ours.decoded(small, state_name), theirs.state[small][state_name].float())


@pytest.mark.parametrize("form", FORMATS)
def test_fp32_states_of_torch_step_alike_after_loading(form):
    net, other = model(), model()
    theirs, ours = torch.optim.AdamW(net.parameters()), optim.AdamW(other.parameters(), state_format=form)
    train(net, theirs, range(3))
    train(other, ours, range(3))
    with torch.no_grad():
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(train(net, theirs, [3]), train(other, ours, [3]), strict=True):
        assert (a - b).abs().mean() < 1e-4  # a step is 1e-3


def test_a_parameter_without_a_state_begins_with_its_first_step():
    """A checkpoint may hold an empty state, which somebody's look-up made."""
    p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer, loaded = optim.AdamW([p]), optim.AdamW([q])
    assert not optimizer.state[p]
    loaded.load_state_dict(optimizer.state_dict())
    q.grad = torch.ones(4)
    loaded.step()
    assert loaded.state[q]["step"] == 1


def test_the_format_of_a_checkpoint_stays():
    net = model()
    first = optim.AdamW(net.parameters(), state_format="dynamic")
    train(net, first, [0])
    second = optim.AdamW(net.parameters())
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["state_format"] == ("dynamic/256", "dynamic/256")
    train(net, second, [1])


def test_options_that_torch_has_and_we_have_not_are_refused():
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), amsgrad=True)
    train(net, theirs, [0])
    with pytest.raises(ValueError, match="amsgrad"):
        optim.AdamW(net.parameters()).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="always decoupled; use Adam"):
        optim.AdamW(net.parameters()).load_state_dict(torch.optim.Adam(net.parameters()).state_dict())


@pytest.mark.parametrize("load, message", [
    (lambda net: {}, "with the keys 'state' and 'param_groups', not \\[\\]"),
    (lambda net: 3, "not int"),
    (lambda net: {"model": net.state_dict(), "step": 1}, "not \\['model', 'step'\\]"),
    (lambda net: torch.optim.SGD(net.parameters()).state_dict(), "no betas, eps, which AdamW needs"),
    (lambda net: optim.Lion(net.parameters()).state_dict(), "no eps, which AdamW needs"),
])
def test_what_is_no_checkpoint_of_this_optimizer_is_refused(load, message):
    net = model()
    optimizer = optim.AdamW(net.parameters())
    train(net, optimizer, [0])
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(load(net))
    assert optimizer.state_dict()["state"].keys() == before["state"].keys()


def test_other_groups_are_refused():
    net = model()
    with pytest.raises(ValueError, match="group"):
        optim.AdamW(net.parameters()).load_state_dict(optim.AdamW(net[0].parameters()).state_dict())


def test_hooks_see_the_load():
    net = model()
    optimizer = optim.AdamW(net.parameters())
    train(net, optimizer, [0])
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [4]
