"""What a user does with the optimizers: options, groups, schedulers, scalers, and what they are refused."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn

from quartet import optim
from quartet.kernels.spec import SpecError

CLASSES = (optim.AdamW, optim.Adam, optim.Lion, optim.SGD)
FORMATS = ("fp32", "bf16", ("e4m3", "e5m2"), "e4m3/tensor current", "e4m3/256", "dynamic", "coat")


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 256)).to(dtype)


def step(net, optimizer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 1e-2
    return optimizer.step()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quadratic_is_minimised(make, dtype):
    p = nn.Parameter(torch.full((64, 256), 2.0, dtype=dtype))
    optimizer = make([p], 0.05)
    for _ in range(60):
        p.grad = p.detach() * 0.5
        optimizer.step()
    assert p.abs().max() < 1.0


@pytest.mark.parametrize("form", FORMATS)
def test_states_are_small_and_small_tensors_keep_fp32(form):
    net = model()
    optimizer = optim.AdamW(net.parameters(), state_format=form)
    step(net, optimizer)
    state = optimizer.state[net[0].bias]
    assert state["exp_avg"].dtype is torch.float32 and "exp_avg_scale" not in state
    large = optimizer.state[net[0].weight]
    total = sum(v.nbytes for k, v in large.items() if k != "step")
    fp32 = 8 * net[0].weight.numel()
    assert total <= {"fp32": 1.0, "bf16": 0.5}.get(form, 0.27) * fp32
    assert optimizer.state_bytes() >= total


def test_states_of_every_size_on_request():
    net = model()
    optimizer = optim.AdamW(net.parameters(), min_quantized=0)
    step(net, optimizer)
    assert optimizer.state[net[0].bias]["exp_avg"].dtype is torch.uint8


@pytest.mark.parametrize("form", FORMATS)
def test_decoded_states_are_the_moments(form):
    net = model()
    optimizer = optim.AdamW(net.parameters(), state_format=form)
    step(net, optimizer)
    for p in net.parameters():
        m, v = optimizer.decoded(p, "exp_avg"), optimizer.decoded(p, "exp_avg_sq")
        near = p.grad.abs() > p.grad.abs().max() * 0.1
        torch.testing.assert_close(m[near], 0.1 * p.grad[near], rtol=0.1, atol=0)
        torch.testing.assert_close(v[near], 0.001 * p.grad[near].square(), rtol=0.25, atol=0)


def test_a_state_that_is_not_there_is_named():
    net = model()
    optimizer = optim.Lion(net.parameters())
    with pytest.raises(KeyError, match="none before a step"):
        optimizer.decoded(net[0].weight, "exp_avg")
    step(net, optimizer)
    with pytest.raises(KeyError, match="exp_avg_sq.*it has"):
        optimizer.decoded(net[0].weight, "exp_avg_sq")


def test_groups_have_their_own_options():
    net = model()
    groups = [{"params": [net[0].weight], "state_format": "dynamic", "lr": 1e-1}, {"params": [net[2].weight]}]
    optimizer = optim.AdamW(groups, 1e-3)
    optimizer.add_param_group({"params": [net[0].bias, net[2].bias], "weight_decay": 0.0})
    before = weights(net)
    step(net, optimizer)
    assert optimizer.param_groups[0]["state_format"] == ("dynamic/256", "dynamic/256")
    assert optimizer.param_groups[1]["state_format"] == ("e4m3/tensor", "e5m2/tensor")
    moved = [(a - b).abs().max() for a, b in zip(before, weights(net), strict=True)]
    assert moved[0] > 50 * moved[2]


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_set_the_rate(tensor):
    def trained(scheduled):
        net = model()
        rate = torch.tensor(1e-2) if tensor else 1e-2
        optimizer = optim.AdamW(net.parameters(), rate, state_format="fp32")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i) if scheduled else None
        for i in range(3):
            if not scheduled:
                optimizer.param_groups[0]["lr"] = 1e-2 * 0.5**i
            step(net, optimizer, i)
            if scheduler is not None:
                scheduler.step()
        return weights(net)

    for a, b in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_clipped_gradients_are_what_counts():
    net, other = model(), model()
    a, b = optim.SGD(net.parameters(), 1.0), optim.SGD(other.parameters(), 1.0)
    step(net, a)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        p.grad = q.grad.clone() * 100
    nn.utils.clip_grad_norm_(other.parameters(), nn.utils.get_total_norm([q.grad for q in net.parameters()]))
    b.step()
    for p, q in zip(weights(net), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_a_scaler_divides_the_gradient_and_skips_what_overflowed(form):
    net, scaled = model(), model()
    plain, optimizer = (optim.AdamW(n.parameters(), state_format=form) for n in (net, scaled))
    step(net, plain)
    for p, q in zip(scaled.parameters(), net.parameters(), strict=True):
        p.grad = q.grad * 1024
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert_equal(weights(net), weights(scaled))
    before, states = weights(scaled), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.tensor(1.0)
    for p in scaled.parameters():
        p.grad = p.grad * float("inf")
    optimizer.step()
    assert_equal(before, weights(scaled))
    for key, state in optimizer.state_dict()["state"].items():
        assert_equal(state.values(), states[key].values())


def test_a_grad_scaler_of_torch_drives_it():
    net = model()
    optimizer = optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = weights(net)
    loss = net(torch.randn(8, 256)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before[0], net[0].weight)
    assert optimizer.state[net[0].weight]["step"] == 1


def test_a_closure_is_called_with_gradients_on():
    net = model()
    optimizer = optim.AdamW(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 256)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first


def test_parameters_without_gradient_are_left_alone():
    net = model()
    optimizer = optim.AdamW(net.parameters())
    before = weights(net)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    assert not torch.equal(before[0], net[0].weight) and torch.equal(before[2], net[2].weight)
    assert net[2].weight not in optimizer.state


def test_channels_last_steps_like_contiguous():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 16, 3)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    a, b = (optim.AdamW(c.parameters(), 1e-2, state_format="fp32") for c in (conv, last))
    g = torch.randn(conv.weight.shape)
    for _ in range(2):
        conv.weight.grad, last.weight.grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert torch.equal(conv.weight, last.weight)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)


# ---- stochastic rounding and master weights ------------------------------------------------------------------------


def test_stochastic_rounding_repeats_and_is_seeded():
    def trained(seed):
        net = model(torch.bfloat16)
        optimizer = optim.AdamW(net.parameters(), stochastic_rounding=True,
                                generator=torch.Generator().manual_seed(seed))
        for i in range(3):
            step(net, optimizer, i)
        return weights(net)

    assert_equal(trained(1), trained(1))
    assert not torch.equal(trained(1)[0], trained(2)[0])


def test_stochastic_rounding_moves_on_average_what_nearest_does_not():
    """A step of an eighth of the spacing: nearest stands still, the mean of many elements moves by it."""
    def moved(stochastic):
        p = nn.Parameter(torch.full((256, 256), 1.5, dtype=torch.bfloat16))
        optimizer = optim.SGD([p], 1.0, stochastic_rounding=stochastic, generator=generator())
        for _ in range(4):
            p.grad = torch.full_like(p, 2.0**-10)
            optimizer.step()
        return 1.5 - p.float().mean().item()

    assert moved(False) == 0.0
    assert moved(True) == pytest.approx(4 * 2.0**-10, rel=0.05)


def test_master_weights_keep_what_bfloat16_loses():
    for master in ("fp16", "fp32"):
        p = nn.Parameter(torch.full((256, 256), 1.5, dtype=torch.bfloat16))
        optimizer = optim.SGD([p], 1.0, momentum=0.9, master=master)
        for _ in range(8):
            p.grad = torch.full_like(p, 2.0**-10)
            optimizer.step()
        exact = 1.5 - 2.0**-10 * sum((1 - 0.9**k) / 0.1 for k in range(1, 9))
        assert optimizer.decoded(p, "master").mean().item() == pytest.approx(exact, abs=2e-3)
        assert torch.equal(optimizer.decoded(p, "master").bfloat16(), p)


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(duplicate):
    net = model(torch.bfloat16)
    optimizer = optim.AdamW(net.parameters(), stochastic_rounding=True)
    step(net, optimizer)
    other, copied = duplicate((net, optimizer))
    step(net, optimizer, 2)
    assert not torch.equal(net[0].weight, other[0].weight)
    step(other, copied, 2)
    assert_equal(weights(net), weights(other))


# ---- arguments of torch.optim ----------------------------------------------------------------------------------------

NAMESAKES = ("Adam", "AdamW", "SGD")
REFUSED = {"amsgrad": "no amsgrad", "differentiable": "no differentiable step"}


@pytest.mark.parametrize("name", NAMESAKES)
def test_a_class_takes_what_its_namesake_takes(name):
    """The same names, places and defaults; ``True`` for each option is accepted, or refused by an error of its own."""
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, torch.optim))
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[:len(positional)] == positional
    assert theirs.keys() <= ours.keys()
    for option, parameter in theirs.items():
        assert ours[option].kind is parameter.kind and ours[option].default == parameter.default, option
        if not isinstance(parameter.default, bool) and parameter.default is not None:
            continue
        momentum = {"momentum": 0.9} if option == "nesterov" else {}
        if option in REFUSED:
            with pytest.raises(ValueError, match=f"{name} has {REFUSED[option]}"):
                getattr(optim, name)(model().parameters(), **{option: True})
        else:
            getattr(optim, name)(model().parameters(), **{option: True}, **momentum)


def test_adam_with_decoupled_weight_decay_is_adamw():
    nets, make = [model() for _ in range(3)], {"weight_decay": 0.1}
    optimizers = [optim.AdamW(nets[0].parameters(), **make),
                  optim.Adam(nets[1].parameters(), decoupled_weight_decay=True, **make),
                  optim.Adam(nets[2].parameters(), **make)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        step(net, optimizer, 2)
    assert_equal(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)


def test_a_group_may_switch_its_weight_decay():
    """Between steps too: what is kept of a group from one step to the next follows."""
    nets = [model() for _ in range(2)]
    optimizers = [optim.Adam(net.parameters(), weight_decay=0.1) for net in nets]
    for at in range(2):
        for group in optimizers[0].param_groups:
            group["decoupled_weight_decay"] = bool(at)
        for net, optimizer in zip(nets, optimizers, strict=True):
            step(net, optimizer)
        assert torch.equal(nets[0][0].weight, nets[1][0].weight) is (at == 0)


def test_checkpoints_of_decoupled_adam_go_both_ways():
    net = model()
    theirs = torch.optim.Adam(net.parameters(), decoupled_weight_decay=True)
    step(net, theirs)
    ours = optim.Adam(model().parameters())
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["decoupled_weight_decay"] is True
    theirs.load_state_dict(ours.torch_state_dict())
    assert theirs.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion"])
def test_tensors_of_one_number_are_numbers(name, shape):
    nets = [model() for _ in range(2)]
    numbers = [0.875, 0.9375, 0.125]  # exact in fp32
    kinds = [numbers, [torch.full(shape, x) for x in numbers]]
    for net, (b1, b2, decay) in zip(nets, kinds, strict=True):
        optimizer = getattr(optim, name)(net.parameters(), betas=(b1, b2), weight_decay=decay)
        step(net, optimizer, 2)
    assert_equal(weights(nets[0]), weights(nets[1]))
    assert optimizer.param_groups[0]["betas"] == (0.875, 0.9375)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": -1.0}, "lr must be at least 0"),
    ({"betas": (1.0, 0.9)}, "first of betas"),
    ({"betas": (0.9, torch.tensor([0.9, 0.9]))}, r"second of betas must be one number, not a tensor of shape \[2\]"),
    ({"betas": (0.9,)}, "two numbers"),
    ({"weight_decay": torch.zeros(3)}, "weight_decay must be one number"),
    ({"eps": -1.0}, "eps must be"),
    ({"weight_decay": -1.0}, "weight_decay must be"),
    ({"amsgrad": True}, "no amsgrad"),
    ({"differentiable": True}, "differentiable"),
    ({"master": "fp8"}, "master 'fp8' does not exist"),
    ({"master": "fp16", "stochastic_rounding": True}, "exclude each other"),
    ({"min_quantized": -1}, "min_quantized"),
    ({"min_quantized": math.nan}, "min_quantized"),
    ({"state_format": ("e4m3", "e5m2", "fp32")}, "3 entries for 2 states"),
    ({"state_format": ("e4m3/256", "e4m3/128")}, "128 and 256 do not go together"),
    ({"lr": torch.ones(2)}, "one number"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW(model().parameters(), **options)


def test_a_format_that_does_not_exist_is_named():
    with pytest.raises(SpecError, match="e9m9"):
        optim.AdamW(model().parameters(), state_format="e9m9")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="float32, bfloat16 and float16"):
        optim.AdamW([nn.Parameter(torch.zeros(4, dtype=dtype))])


def test_gaps_in_memory_are_refused():
    with pytest.raises(ValueError, match="gaps or overlaps"):
        optim.AdamW([nn.Parameter(torch.zeros(8, 8)[:, ::2])])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(100, 64, sparse=True)
    optimizer = optim.AdamW(table.parameters())
    table(torch.tensor([3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"nesterov": True}, {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
                                     {"momentum": -0.1}, {"momentum": math.nan}, {"dampening": math.nan}])
def test_sgd_says_what_goes_together(options):
    with pytest.raises(ValueError, match="momentum|dampening"):
        optim.SGD(model().parameters(), **options)


def test_formats_do_not_change_under_way():
    net = model()
    optimizer = optim.AdamW(net.parameters())
    step(net, optimizer)
    optimizer.param_groups[0]["state_format"] = ("fp32", "fp32")
    with pytest.raises(ValueError, match="cannot change after its first step"):
        step(net, optimizer)


def test_a_bad_group_is_not_added():
    optimizer = optim.AdamW(model().parameters())
    with pytest.raises(SpecError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "state_format": "nothing"})
    assert len(optimizer.param_groups) == 1


def test_empty_parameters_do_no_harm():
    p = nn.Parameter(torch.zeros(0, 256))
    optimizer = optim.AdamW([p], min_quantized=0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (0, 256)


def test_a_step_is_an_in_place_change_to_autograd():
    p = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = optim.AdamW([p], lr=1e-2)
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    before = p._version
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- seeds and tensors of others -----------------------------------------------------------------------------


def test_the_users_generator_is_left_alone_and_its_seed_is_followed():
    def made(seed, width=256):
        torch.manual_seed(seed)
        torch.rand(seed)  # how much was drawn does not matter
        before = torch.get_rng_state()
        optimizer = optim.AdamW([nn.Parameter(torch.zeros(64, width))], stochastic_rounding=True)
        assert torch.equal(torch.get_rng_state(), before)
        return optimizer.param_groups[0]["seed"]

    assert made(1) == made(1)
    assert len({made(1), made(2), made(1, 128)}) == 3
    assert all(1 << 62 <= made(seed) < 1 << 63 for seed in range(20))


def test_groups_share_the_seed_unless_they_name_one():
    net = model()
    optimizer = optim.AdamW([{"params": [net[0].weight]}, {"params": [net[2].weight], "seed": 5}])
    optimizer.add_param_group({"params": [net[0].bias]})
    seeds = [group["seed"] for group in optimizer.param_groups]
    assert seeds[0] == seeds[2] != seeds[1] == 5


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_of_others_step_like_parameters(form):
    net, other = model(), model()
    own, borrowed = (optim.AdamW(n.parameters(), state_format=form) for n in (net, other))
    kept = [{} for _ in other.parameters()]
    for i in range(3):
        step(net, own, i)
        apart = [nn.Parameter(p.detach().clone()) for p in other.parameters()]
        for tensor, q, state in zip(apart, net.parameters(), kept, strict=True):
            tensor.grad = q.grad.clone()
            borrowed.state[tensor].update(state)
        before = weights(other)
        borrowed.step_tensors(apart, borrowed.param_groups[0])
        assert_equal(before, weights(other))
        kept = [borrowed.state.pop(tensor) for tensor in apart]
        with torch.no_grad():
            for p, tensor in zip(other.parameters(), apart, strict=True):
                p.copy_(tensor)
    assert_equal(weights(net), weights(other))
    for p, state in zip(net.parameters(), kept, strict=True):
        assert_equal(own.state[p].values(), state.values())
    assert not borrowed.state


def test_stepped_tensors_are_let_go():
    import weakref

    optimizer = optim.AdamW(model().parameters())
    tensor = nn.Parameter(torch.ones(64, 128))
    tensor.grad, before = torch.ones_like(tensor), weakref.ref(tensor)
    optimizer.step_tensors([tensor, nn.Parameter(torch.ones(3))], optimizer.param_groups[0])
    assert list(optimizer.state) == [tensor] and optimizer.state.pop(tensor)["step"] == 1
    del tensor
    assert before() is None
