"""The wrapper: every grid trains, runs repeat and resume bit for bit, around every inner optimizer."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import BITS, assert_same, net, stored, task, train, wrapped  # noqa: E402

from quartet import direct, optim  # noqa: E402

INNER = {
    "adamw": torch.optim.AdamW,
    "adamw-loop": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False),
    "adamw-fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=10 * lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9),
    "fp8": lambda p, lr: optim.AdamW(p, lr=lr, min_quantized=0),
    "fp8-blocks": lambda p, lr: optim.AdamW(p, lr=lr, min_quantized=0, state_format="e4m3/64"),
    "lion": lambda p, lr: optim.Lion(p, lr=lr / 3, min_quantized=0),
}


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_every_grid_trains(bits, paper):
    model = net(bits, paper=paper)
    before = stored(model)
    losses = train(model, wrapped(model), 60)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert not torch.equal(before["down.weight.codes"], model.down.weight.codes)
    assert (model.down.weight.scale.numel() == 1) is paper
    assert not paper or torch.equal(before["down.weight.scale"], model.down.weight.scale)


@pytest.mark.parametrize("name", INNER)
def test_every_inner_optimizer_trains_and_resumes_bit_for_bit(name, tmp_path):
    model = net(8)
    optimizer = wrapped(model, INNER[name], feedback=name == "momentum")
    losses = train(model, optimizer, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    losses += train(model, optimizer, 20)
    assert losses[-1] < losses[0]
    saved = torch.load(tmp_path / "run.pt")
    resumed = net(8, seed=3)
    again = wrapped(resumed, INNER[name], seed=9, feedback=name == "momentum")
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert train(resumed, again, 20) == losses[5:]
    assert_same(stored(model), stored(resumed))


def test_states_keep_their_dtype_when_a_16_bit_model_resumes():
    model = net(8).bfloat16()
    optimizer = wrapped(model)
    model(task()[0].bfloat16()).sum().backward()
    optimizer.step()
    other = wrapped(model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[model.up.weight].items():
        assert other.state[model.up.weight][key].dtype is value.dtype is torch.float32
        assert torch.equal(other.state[model.up.weight][key], value)


@pytest.mark.parametrize("options", [{}, {"feedback": True}, {"rescale": "rare"}, {"rescale": None}])
def test_runs_repeat(options):
    models = [net(4), net(4)]
    for model in models:
        train(model, wrapped(model, rescale_every=2, **options), 6)
    assert_same(*map(stored, models))


def test_seeds_and_steps_draw_other_bits():
    changed = []
    for seed in (0, 0, 1):
        model = net("ternary")
        optimizer = wrapped(model, torch.optim.SGD, lr=0.2, seed=seed, rescale=None)
        for _ in range(2):
            before = model.down.weight.unpacked()
            model.down.weight.grad = torch.full((64, 64), 0.01)
            optimizer.step()
            changed.append(model.down.weight.unpacked() != before)
    assert torch.equal(changed[0], changed[2]) and not torch.equal(changed[0], changed[4])
    assert not torch.equal(changed[0], changed[1])


def test_the_bucket_size_changes_nothing():
    models = [net(4), net(4)]
    for model, size in zip(models, (0, 1 << 30), strict=True):
        train(model, wrapped(model, bucket_bytes=size), 5)
    assert_same(*map(stored, models))


def test_numbers_exist_for_one_bucket_at_a_time():
    from torch.utils._python_dispatch import TorchDispatchMode

    layers, width = 6, 128
    model = direct.convert(nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))), "ternary")
    optimizer = wrapped(model, torch.optim.SGD, bucket_bytes=0)
    for layer in model:
        layer.weight.grad = torch.ones(width, width)
    alive = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if func is torch.ops.aten.mul.Tensor and out.shape == (width, width) and out.dtype is torch.float32:
                import weakref

                alive.append(weakref.ref(out))
                most.append(sum(r() is not None for r in alive))
            return out

    most = []
    with Watch():
        optimizer.step()
    assert len(most) >= layers and max(most) <= 3
    assert all(isinstance(p, direct.LowBitWeight) for group in optimizer.param_groups for p in group["params"])
    assert all(isinstance(p, direct.LowBitWeight) for p in optimizer.state)


def test_plain_parameters_train_as_the_inner_optimizer_trains_them():
    model, twin = net(8), net(8)
    optimizer, plain = wrapped(model), torch.optim.AdamW(list(twin.head.parameters()), lr=3e-3)
    for m, o in ((model, optimizer), (twin, plain)):
        for p in m.parameters():
            p.grad = torch.full(p.shape, 0.1)
        o.step()
    assert torch.equal(model.head.weight, twin.head.weight) and torch.equal(model.head.bias, twin.head.bias)


def test_an_unrounded_step_is_the_inner_optimizers():
    model = net(8)
    before = model.down.weight.dequantize()
    step = model.down.weight.scale[:, None]
    optimizer = wrapped(model, torch.optim.SGD, lr=1.0, rescale=None)
    model.down.weight.grad = (-3 * step).expand(64, 64).contiguous()
    optimizer.step()
    expected = (before + 3 * step).clamp(max=(127 * step))
    assert (model.down.weight.dequantize() - expected).abs().max() <= step.max() * 1.01
    assert optimizer.flipped() > 0.9


def test_gradients_accumulate_and_are_clipped():
    x, y = task()
    model, twin = net(8), net(8)
    nn.functional.cross_entropy(model(x), y).backward()
    for half in (slice(0, 64), slice(64, 128)):
        (0.5 * nn.functional.cross_entropy(twin(x[half]), y[half])).backward()
    assert torch.allclose(model.up.weight.grad, twin.up.weight.grad, atol=1e-6)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    left = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 1e-3 and abs(left - 1e-3) < 1e-5


def test_schedulers_groups_and_closures():
    model = net(8)
    groups = [{"params": [model.up.weight, model.down.weight], "weight_decay": 0.0},
              {"params": [model.head.weight], "lr": 0.5}]
    optimizer = direct.Optimizer(torch.optim.AdamW(groups, lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    x, y = task()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.25]
    optimizer.add_param_group({"params": [model.norm.weight]})
    optimizer.step(closure)
    assert len(optimizer.inner.param_groups) == 3


def test_a_grad_scaler_skips_infinities():
    model = net(8)
    optimizer, scaler = wrapped(model, torch.optim.SGD), torch.amp.GradScaler("cpu", init_scale=256.0)
    x, y = task()
    for factor, moves in ((float("inf"), False), (1.0, True)):
        before = stored(model)
        scaler.scale(factor * nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (not torch.equal(before["down.weight.scale"], model.down.weight.scale)) is moves


def test_a_parameter_without_gradient_stays():
    model = net(8)
    before = stored(model)
    optimizer = wrapped(model)
    model.up.weight.grad = torch.ones(64, 32)
    optimizer.step()
    after = stored(model)
    assert not torch.equal(before.pop("up.weight.codes"), after.pop("up.weight.codes"))
    before.pop("up.weight.scale"), after.pop("up.weight.scale")
    assert_same(before, after)


def test_a_failed_inner_step_leaves_groups_and_states_whole():
    model = net(8)
    optimizer = wrapped(model)
    train(model, optimizer, 1)
    params = [list(g["params"]) for g in optimizer.param_groups]
    model.up.weight.grad, model.down.weight.grad = torch.ones(64, 32), torch.ones(64, 64)
    step, optimizer.inner.step = optimizer.inner.step, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.inner.step = step
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(p) for p in g] for g in params]
    assert model.up.weight in optimizer.state
    optimizer.step()


def test_a_factory_and_a_pickle():
    model = net(4)
    optimizer = direct.Optimizer(optim.AdamW, model.parameters())
    train(model, optimizer, 2)
    both = copy.deepcopy({"model": model, "optimizer": optimizer})
    assert train(model, optimizer, 3) == train(both["model"], both["optimizer"], 3)
    torch.save(optimizer.state_dict(), io.BytesIO())


def test_weight_decay_alone_flips_no_code_in_radial_mode():
    model = net("ternary")
    optimizer = wrapped(model, lambda p, lr: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), rescale="radial")
    before = stored(model)
    model.down.weight.grad = torch.zeros(64, 64)
    optimizer.step()
    assert torch.equal(before["down.weight.codes"], model.down.weight.codes)
    assert torch.allclose(model.down.weight.scale, 0.95 * before["down.weight.scale"])


def test_errors_name_the_remedy():
    model = net(4)
    with pytest.raises(ValueError, match="convert the model before"):
        wrapped(net())
    with pytest.raises(ValueError, match="leave out master="):
        direct.Optimizer(optim.AdamW(model.parameters(), master="fp16"))
    with pytest.raises(ValueError, match="LBFGS looks at all parameters at once"):
        direct.Optimizer(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="wrapped already"):
        direct.Optimizer(wrapped(model))
    with pytest.raises(ValueError, match="'radial', 'rare' or None"):
        wrapped(model, rescale="often")
    with pytest.raises(ValueError, match="at least 1"):
        wrapped(model, rescale_every=0)
    with pytest.raises(ValueError, match="bucket_bytes 0, not 64 and nan"):
        wrapped(model, bucket_bytes=float("nan"))
    with pytest.raises(TypeError, match="a function that builds one of params, not int"):
        direct.Optimizer(3)
    with pytest.raises(ValueError, match="give params"):
        direct.Optimizer(torch.optim.AdamW)


# ---- around training ----------------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_nothing():
    from torch.utils.checkpoint import checkpoint

    models = [net(4), net(4)]
    optimizers = [wrapped(model) for model in models]
    assert train(models[0], optimizers[0], 5) == train(
        models[1], optimizers[1], 5, lambda x: checkpoint(models[1], x, use_reentrant=False))
    assert_same(*map(stored, models))


@pytest.mark.parametrize("name", ["adamw", "fp8", "lion"])
def test_a_pair_is_copied_whole(name):
    model = net("ternary")
    optimizer = wrapped(model, INNER[name], feedback=True)
    train(model, optimizer, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.param_groups is copied.inner.param_groups and copied.state is copied.inner.state
    assert all(any(p is q for q in twin.parameters()) for g in copied.param_groups for p in g["params"])
    before = stored(twin)
    losses = train(model, optimizer, 3)
    assert_same(before, stored(twin))
    assert train(twin, copied, 3) == losses
    assert_same(stored(model), stored(twin))


@pytest.mark.parametrize("name", ["adamw", "fp8"])
def test_a_power_of_two_from_a_grad_scaler_cancels(name):
    models, x, y = [net(8), net(8)], *task()
    optimizers = [wrapped(model, INNER[name]) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        nn.functional.cross_entropy(models[0](x), y).backward()
        optimizers[0].step()
        scaler.scale(nn.functional.cross_entropy(models[1](x), y)).backward()
        scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_same(*map(stored, models))


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "fp8"])
def test_steps_that_are_tensors_go_with_the_parameter(name):
    """Fused and capturable optimizers count on the device; a parameter without gradient is not counted."""
    model = net(8)
    optimizer = wrapped(model, lambda p, lr: INNER[name](p, lr))
    for both in (True, False, True):
        model.up.weight.grad = torch.ones(64, 32)
        model.down.weight.grad = torch.ones(64, 64) if both else None
        optimizer.step()
    steps = [optimizer.state[layer.weight]["step"] for layer in (model.up, model.down)]
    assert [s.item() for s in steps] == [3, 2] and all(s.dtype is torch.float32 for s in steps)
    saved = copy.deepcopy(optimizer.state_dict())
    again = wrapped(net(8), INNER[name])
    again.load_state_dict(saved)
    assert [state["step"].item() for state in again.state.values()] == [3, 2]


def test_a_tensor_learning_rate_is_read_in_every_step():
    model, twin = net(8), net(8)
    rate = torch.tensor(1e-3)
    pair = [wrapped(m, lambda p, lr: optim.AdamW(p, lr=lr, min_quantized=0), lr=r) for m, r in
            ((model, rate), (twin, 1e-3))]
    for factor in (1.0, 0.5):
        rate.fill_(1e-3 * factor)
        pair[1].param_groups[0]["lr"] = rate.item()
        assert train(model, pair[0], 2) == train(twin, pair[1], 2)
    assert_same(stored(model), stored(twin))


def test_a_cuda_graph_is_refused(monkeypatch):
    model = net(8)
    optimizer = wrapped(model)
    before = stored(model)
    model.up.weight.grad = torch.ones(64, 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph.*random bits"):
        optimizer.step()
    assert_same(before, stored(model))


def test_the_users_generator_is_left_alone_and_its_seed_is_followed():
    seeds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        seeds.append(direct.Optimizer(torch.optim.SGD(net(4, seed=seed).parameters(), lr=0.1)).param_groups[0])
        torch.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), before)
    first, second, third = (group["direct_seed"] for group in seeds)
    assert first == second != third
