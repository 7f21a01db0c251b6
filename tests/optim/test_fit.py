"""States and gradients of other shapes, devices and orders in memory than their parameter's: refused, or followed."""

import copy
import re

import pytest
import torch
from torch import nn

from quartet import optim

ROWS, COLS = 40, 256
OTHERS = {"more rows": (48, COLS), "fewer rows": (24, COLS), "more columns": (ROWS, 320), "one row": (1, COLS),
          "turned": (COLS, ROWS), "flat": (ROWS * COLS,)}
FORMATS = ("fp32", "bf16", "e4m3", "e4m3/tensor current", "e4m3/256", "dynamic", "coat")
MAKES = {f"{name} {form}": (lambda p, name=name, form=form: getattr(optim, name)(
    p, lr=1e-2, state_format=form, **({"momentum": 0.9} if name == "SGD" else {})))
    for name in ("AdamW", "Lion", "SGD") for form in FORMATS}
MAKES |= {"master": lambda p: optim.AdamW(p, lr=1e-2, master="fp16"),
          "rounded": lambda p: optim.Adam(p, lr=1e-2, stochastic_rounding=True)}


def parameter(shape, seed=0, dtype=torch.bfloat16):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def step(optimizer, *params):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
    optimizer.step()


def everything(optimizer):
    """Copies of all weights and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def naming(*shapes, name="parameter 1 of group 0"):
    return "(?s)" + f"{re.escape(name)}.*" + ".*".join(re.escape(str(list(shape))) for shape in shapes)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_loaded_state_of_another_shape(make, other):
    saved, params = [parameter((8, 8)), parameter(other)], [parameter((8, 8)), parameter((ROWS, COLS))]
    theirs, ours = make(saved), make(params)
    step(theirs, *saved)
    step(ours, *params)
    before = everything(ours)
    with pytest.raises(ValueError, match=naming(other, (ROWS, COLS))):
        ours.load_state_dict(theirs.state_dict())
    assert_equal(everything(ours), before)
    twin = copy.deepcopy(ours)
    step(ours, *params)
    step(twin, *twin.param_groups[0]["params"])
    assert_equal(everything(ours), everything(twin))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_state_of_torch_of_another_shape(name, form):
    more = {"momentum": 0.9} if name == "SGD" else {}
    p, q = parameter((48, COLS)), parameter((ROWS, COLS))
    theirs, ours = getattr(torch.optim, name)([p], 1e-2, **more), getattr(optim, name)([q], 1e-2, state_format=form,
                                                                                    **more)
    step(theirs, p)
    with pytest.raises(ValueError, match=naming((48, COLS), (ROWS, COLS), name="parameter 0 of group 0")):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_parameter_that_got_another_shape(make, other):
    """Of another group than the first: no parameter is stepped."""
    first, second = parameter((8, 8)), parameter((ROWS, COLS))
    optimizer = make([{"params": [first]}, {"params": [second]}])
    step(optimizer, first, second)
    second.data = parameter(other).data
    before = everything(optimizer)
    with pytest.raises(ValueError, match=naming((ROWS, COLS), other, name="parameter 0 of group 1")):
        step(optimizer, first, second)
    assert_equal(everything(optimizer), before)
    optimizer.state.pop(second)
    step(optimizer, first, second)
    assert optimizer.state[second]["step"] == 1 and optimizer.state[first]["step"] == 2


def test_rows_cut_off_in_place():
    """The address stays."""
    p = parameter((ROWS, COLS))
    optimizer = optim.AdamW([p])
    step(optimizer, p)
    p.data = p.data[:24]
    with pytest.raises(ValueError, match=naming((ROWS, COLS), (24, COLS), name="parameter 0 of group 0")):
        step(optimizer, p)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_scale"])
def test_a_state_changed_by_hand(key):
    p = parameter((ROWS, COLS))
    optimizer = optim.AdamW([p], state_format="e4m3/256")
    step(optimizer, p)
    optimizer.state[p][key] = optimizer.state[p][key][:24].clone()
    with pytest.raises(ValueError, match="'exp_avg' of parameter 0 of group 0"):
        step(optimizer, p)


def test_a_gradient_that_is_older_than_the_data():
    p = parameter((ROWS, COLS))
    optimizer = optim.AdamW([p])
    p.grad = torch.zeros_like(p)
    p.data = parameter((48, COLS)).data
    with pytest.raises(ValueError, match=naming((ROWS, COLS), (48, COLS), name="parameter 0 of group 0")):
        optimizer.step()


def test_names_are_used_where_there_are_some():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = optim.AdamW(net.named_parameters())
    step(optimizer, *net.parameters())
    net[1].weight.data = torch.zeros(9, 8)
    with pytest.raises(ValueError, match=naming((8, 8), (9, 8), name="parameter '1.weight'")):
        step(optimizer, *net.parameters())


@pytest.mark.parametrize("how", [
    lambda state: {k: v.clone() for k, v in state.items()},
    lambda state: [setattr(v, "data", v.data.clone()) for v in state.values()] and state,
])
def test_states_put_elsewhere_are_followed(how):
    """As offloading does: new tensors, or new memory of the same ones."""
    p, q = parameter((ROWS, COLS)), parameter((ROWS, COLS))
    ours, other = optim.AdamW([p]), optim.AdamW([q])
    for _ in range(3):
        step(ours, p)
        step(other, q)
        old = dict(ours.state[p])
        ours.state[p] = how(ours.state[p])
        for key, value in old.items():
            if value is not ours.state[p][key]:
                value.zero_()
    assert_equal(everything(ours), everything(other))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("through", ["a checkpoint", "the data"])
def test_another_order_in_memory_is_followed(form, through):
    """The moments of each element stay its own."""
    p = nn.Parameter(torch.randn(16, 8, 12, 12))
    optimizer = optim.AdamW([p], state_format=form)
    step(optimizer, p)
    moments = optimizer.decoded(p, "exp_avg")
    if through == "the data":
        p.data = p.data.to(memory_format=torch.channels_last)
    else:
        q = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
        other = optim.AdamW([q], state_format=form)
        other.load_state_dict(optimizer.state_dict())
        p, optimizer = q, other
    p.grad = torch.zeros_like(p)
    optimizer.step()
    after = optimizer.decoded(p, "exp_avg")
    torch.testing.assert_close(after, 0.9 * moments, rtol=0.3, atol=0.02 * moments.abs().max().item())


def test_codes_of_another_format_are_not_taken_for_numbers():
    p, q = parameter((ROWS, COLS)), parameter((ROWS, COLS))
    theirs, ours = optim.AdamW([p], state_format="e4m3/256"), optim.AdamW([q], state_format="fp32")
    step(theirs, p)
    saved = theirs.state_dict()
    del saved["param_groups"][0]["state_format"]
    with pytest.raises(ValueError, match="'exp_avg' of parameter 0 of group 0 are codes of another format.*fp32"):
        ours.load_state_dict(saved)
    assert not ours.state and ours.param_groups[0]["state_format"] == ("fp32", "fp32")


@pytest.mark.parametrize("make", [optim.AdamW, optim.Adam, optim.Lion, optim.SGD])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_that_became_double_says_so_and_goes_back(make, steps):
    net = nn.Sequential(nn.Linear(8, 8))
    optimizer = make(net.named_parameters())
    for _ in range(steps):
        step(optimizer, *net.parameters())
    net.double()
    with pytest.raises(TypeError, match=r"(?s)parameter '0\.weight'.*torch\.float64.*model\.float\(\)"):
        step(optimizer, *net.parameters())
    net.float()
    step(optimizer, *net.parameters())
    assert optimizer.state[net[0].weight]["step"] == steps + 1


def test_a_16_bit_model_with_master_weights_stays_16_bit():
    p = parameter((ROWS, COLS))
    optimizer = optim.AdamW([p], master="fp32")
    step(optimizer, p)
    p.data = p.data.float()
    with pytest.raises(ValueError, match="parameter 0 of group 0 .*master weights.*torch.float32"):
        step(optimizer, p)


def test_ramping_of_another_shape():
    net = nn.Linear(64, 64, bias=False)
    optimizer = optim.QRamping(torch.optim.AdamW(net.parameters()), net)
    step(optimizer, net.weight)
    saved = optimizer.state_dict()
    net.weight.data = torch.zeros(96, 64)
    with pytest.raises(ValueError, match=naming((64, 64), (96, 64), name="weight 0")):
        step(optimizer, net.weight)
    saved["weights"][0]["before"] = torch.zeros(96, 64)
    other = nn.Linear(64, 64, bias=False)
    with pytest.raises(ValueError, match=naming((96, 64), (64, 64), name="weight 0")):
        optim.QRamping(torch.optim.AdamW(other.parameters()), other).load_state_dict(saved)
