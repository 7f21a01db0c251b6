"""Independent implementations: torch.optim, and torchao's low-bit optimizers where the format is the same."""

import math
import warnings

import pytest
import torch
from bounded import Bounded

from quartet import optim
from quartet.kernels.reference.optim import states
from quartet.kernels.reference.optim.state_format import StateFormat


def torchao_optim():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.optim")


def problem(dtype=torch.float32, seed=0):
    """A weight matrix and a vector, with gradients of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter((torch.randn(*s, generator=generator) * 0.1).to(dtype)) for s in ((32, 256), (64,))]
    sizes = [10 ** torch.randn(p.shape, generator=generator) for p in params]
    return params, lambda: [torch.randn(p.shape, generator=generator).mul(s * 1e-2).to(dtype)
                            for p, s in zip(params, sizes, strict=True)]


def run(make, steps=10, dtype=torch.float32):
    params, gradients = problem(dtype)
    optimizer = make(params)
    for _ in range(steps):
        for p, g in zip(params, gradients(), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


ADAMS = [{}, {"weight_decay": 0.1}, {"betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True}]
PAIRS = [(name, options) for name in ("Adam", "AdamW") for options in ADAMS] + [
    ("SGD", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
]


def exact(name, options, step, p, g, old):
    """Weights and states after step ``step`` of fp32 weights, gradients and states, as torch's documentation has it."""
    number = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01 if name == "AdamW" else 0.0,
              "momentum": 0.0, "dampening": 0.0} | options
    lr, decay, (b1, b2), momentum = number["lr"], number["weight_decay"], number["betas"], number["momentum"]
    p, g, old = Bounded(p), Bounded(-g if options.get("maximize") else g), {k: Bounded(v) for k, v in old.items()}
    if name == "AdamW":
        p = p * Bounded(1 - lr * decay)
    elif decay:
        g = g + p * Bounded(decay)
    if name == "SGD":
        new = {}
        if momentum:
            share = 1.0 if step == 1 else 1 - number["dampening"]
            kept = old["momentum_buffer"] * Bounded(momentum if step > 1 else 0.0) + g * Bounded(share)
            new, g = {"momentum_buffer": kept}, g + kept * Bounded(momentum) if options.get("nesterov") else kept
        return p - g * Bounded(lr), new
    m = (g - old["exp_avg"]) * Bounded(1 - b1) + old["exp_avg"]
    v = old["exp_avg_sq"] * Bounded(b2) + g * g * Bounded(1 - b2)
    root = v.sqrt() * Bounded(1 / math.sqrt(1 - b2**step)) + Bounded(number["eps"])
    return p - m * Bounded(lr / (1 - b1**step)) / root, {"exp_avg": m, "exp_avg_sq": v}


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_fp32_states_step_as_torch_does(name, options):
    """Each of ten steps, from the same weights and states, within what fp32 allows of the exact ones."""
    params, gradients = problem()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = getattr(optim, name)(params, 1e-2, state_format="fp32", **options)
    theirs = getattr(torch.optim, name)(others, 1e-2, foreach=False, **options)
    for step in range(1, 11):
        if step > 1:
            theirs.load_state_dict(ours.torch_state_dict())
        expected = []
        for p, q, g in zip(params, others, gradients(), strict=True):
            q.data.copy_(p.data)
            p.grad, q.grad = g, g.clone()
            states = {k: v.clone() for k, v in ours.state[p].items() if k != "step"}
            states = states or {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq", "momentum_buffer")}
            expected.append(exact(name, options, step, p.detach().clone(), g, states))
        ours.step()
        theirs.step()
        for p, q, (weight, moments) in zip(params, others, expected, strict=True):
            assert weight.excess(p.detach()) < 1 and weight.excess(q.detach()) < 1
            for key, moment in moments.items():
                assert moment.excess(ours.state[p][key]) < 1 and moment.excess(theirs.state[q][key]) < 1


def test_the_bound_sees_a_learning_rate_that_is_off_by_a_hundred_thousandth():
    (p, _), gradients = problem()
    g = gradients()[0]
    zero = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    weight, _ = exact("AdamW", {}, 1, p.detach(), g, zero)
    wrong, _ = exact("AdamW", {"lr": 1e-2 * (1 + 1e-5)}, 1, p.detach(), g, zero)
    assert weight.excess(weight.value.float()) < 1 < weight.excess(wrong.value.float())


def test_lion_is_its_definition():
    params, gradients = problem()
    mine = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = optim.Lion(mine, 1e-2, (0.9, 0.99), 0.1, state_format="fp32")
    moments = [torch.zeros_like(p) for p in params]
    for _ in range(5):
        for p, q, g, m in zip(params, mine, gradients(), moments, strict=True):
            q.grad = g
            update = (0.9 * m + 0.1 * g).sign()
            p.data.mul_(1 - 1e-2 * 0.1).add_(update, alpha=-1e-2)
            m.mul_(0.99).add_(g, alpha=0.01)
        optimizer.step()
    for p, q in zip(params, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_torchao_fp8_blocks_decode_to_the_same_bits():
    ao = torchao_optim()
    from torchao.optim.subclass_fp8 import OptimStateFp8, quantize_fp8

    assert ao is not None
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * 10 ** torch.randn(64, 1)
    codes, scale = quantize_fp8(x, 256)
    theirs = OptimStateFp8(codes, scale).dequantize()
    form = StateFormat.parse("e4m3/256")
    assert torch.equal(states.decode(codes.view(torch.uint8), scale[:, None], form, True), theirs)
    mine, my_scale = states.encode(x, form, True)
    assert torch.equal(my_scale[:, 0], scale)
    off = mine != codes.view(torch.uint8)  # x · (1 / scale) here, x / scale there
    assert off.float().mean() < 1e-3
    assert (mine.int() - codes.view(torch.uint8).int()).abs().max() <= 1


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes_and_torchao(signed):
    torchao_optim()
    from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap, scale_tensor

    table = torch.tensor(create_dynamic_map(signed))
    form, codes = StateFormat.parse("dynamic"), torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    torch.testing.assert_close(states.decode(codes, torch.ones(1, 1), form, signed)[0], table, rtol=1e-6, atol=0)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)) ** 3
    x = x if signed else x.abs()
    scaled, scale = scale_tensor(x, 256)
    mine, my_scale = states.encode(x, form, signed)
    assert torch.equal(my_scale[:, 0], scale)
    assert (mine != quantize_8bit_with_qmap(scaled, table)).float().mean() < 1e-3


@pytest.mark.parametrize(("theirs", "form"), [("AdamWFp8", "e4m3/256"), ("AdamW8bit", "dynamic"),
                                              ("AdamFp8", "e4m3/256"), ("Adam8bit", "dynamic")])
def test_torchao_trains_to_the_same_weights(theirs, form, monkeypatch):
    """Where torchao compiles its step the rounding of an ulp differs, so that single codes do."""
    ao = torchao_optim()
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    ours = optim.AdamW if theirs.startswith("AdamW") else optim.Adam
    mine, _ = run(lambda p: ours(p, 1e-2, state_format=form), steps=5)
    peers, _ = run(lambda p: getattr(ao, theirs)(p, 1e-2), steps=5)
    for a, b in zip(mine, peers, strict=True):
        off = (a - b).abs()
        assert (off > 1e-5).float().mean() < 0.01
        assert off.max() < 2e-2
