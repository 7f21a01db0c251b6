"""The parameter type: what is converted, what it weighs, what it computes, where it may go."""

import copy
import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import BITS, Net, assert_same, net, stored, task, train, wrapped  # noqa: E402

from quartet import direct  # noqa: E402
from quartet.runtime.direct.linear import int_product, quantize_tokens  # noqa: E402

GOAL = {"ternary": 0.25, 2: 0.25, 3: 0.5, 4: 0.5, 8: 1.0}


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_measured_bytes_a_parameter(bits, paper):
    model = direct.convert(nn.Sequential(nn.Linear(512, 256)), bits, paper=paper)
    found = direct.weight_bytes(model)
    scales = 4 if paper else 4 * 256
    assert found["low_bit_bytes"] == GOAL[bits] * 512 * 256 + scales
    assert found["bytes_per_parameter"] <= GOAL[bits] + 0.05


def test_the_high_precision_weight_is_gone():
    import gc
    import weakref

    model = Net()
    old = weakref.ref(model.up.weight)
    direct.convert(model, 8)
    gc.collect()
    assert old() is None


def test_all_linear_layers_but_the_head_are_converted():
    model = net(4)
    assert set(direct.weights(model)) == {"up.weight", "down.weight"}
    assert isinstance(model.up.weight, nn.Parameter) and type(model.head.weight) is nn.Parameter


def test_skip_that_is_neither_is_refused():
    with pytest.raises(TypeError, match=r"not NoneType; skip=\(\) converts every layer"):
        direct.convert(torch.nn.Linear(64, 64), skip=None)


def test_skip_takes_names_and_functions():
    assert set(direct.weights(net(4, skip="up"))) == {"down.weight", "head.weight"}
    assert set(direct.weights(net(4, skip=("up", "he*")))) == {"down.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of usual names that this model has not
        assert set(direct.weights(net(4, skip=(*direct.SKIPPED, "up")))) == {"down.weight"}
    assert set(direct.weights(net(4, skip=lambda name, layer: layer.bias is not None))) == {"down.weight"}


def test_a_weight_shared_with_an_embedding_is_left():
    model = nn.ModuleDict({"words": nn.Embedding(16, 8), "out": nn.Linear(8, 16, bias=False), "mid": nn.Linear(8, 8)})
    model["out"].weight = model["words"].weight
    assert set(direct.weights(direct.convert(model, 8))) == {"mid.weight"}


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activations", ["int8", None])
def test_forward_and_gradients_are_those_of_the_dequantised_weight(bits, paper, activations):
    model = net(bits, paper=paper, activations=activations)
    x = task()[0].requires_grad_()
    e = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    out = model.up(x)
    out.backward(e)
    weight = model.up.weight.dequantize().double()
    codes, scale = quantize_tokens(x.detach())
    seen = (codes * scale).double() if activations else x.detach().double()
    assert torch.allclose(out.double(), seen @ weight.t() + model.up.bias, atol=1e-5)
    assert torch.allclose(x.grad.double(), e.double() @ weight, atol=1e-5)
    assert torch.allclose(model.up.weight.grad.double(), e.double().t() @ seen, atol=1e-4)
    assert torch.allclose(model.up.bias.grad, e.sum(0), atol=1e-5)
    assert type(model.up.weight.grad) is torch.Tensor


def test_the_integer_product_is_exact():
    for inner in (37, 1):  # of a product over one element a CPU's _int_mm makes something else
        a = torch.randint(-127, 128, (5, inner), dtype=torch.int8)
        b = torch.randint(-128, 128, (3, inner), dtype=torch.int8)
        assert torch.equal(int_product(a, b).long(), a.long() @ b.long().t())


def test_tokens_round_to_nearest_and_show_what_is_not_finite():
    x = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 2.0], [float("inf"), 1.0, 2.0]])
    codes, scale = quantize_tokens(x)
    assert codes[0].tolist() == [127, -64, 0] and not codes[1].any()
    assert torch.isfinite(scale[:2]).all() and scale[2:].isnan().all()


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 5, 32), (0, 32)])
def test_inputs_of_any_rank(shape):
    model = net("ternary")
    out = model.up(torch.ones(shape))
    assert out.shape == (*shape[:-1], 64)
    assert out.numel() == 0 or torch.allclose(out, model.up(torch.ones(1, 32))[0].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moving_to_another_dtype_unpacks_nothing(dtype):
    model, before = net(4), stored(net(4))
    model.to(dtype)
    w = model.up.weight
    assert isinstance(w, direct.LowBitWeight) and w.dtype is dtype and isinstance(w, nn.Parameter)
    assert torch.equal(w.codes, before["up.weight.codes"]) and torch.equal(w.scale, before["up.weight.scale"])
    model(task()[0].to(dtype)).sum().backward()
    assert w.grad.dtype is dtype
    wrapped(model).step()


def test_autocast_gives_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        out = net(8).up(task()[0])
    assert out.dtype is torch.bfloat16


def test_copies_are_independent():
    model = net(8)
    other = copy.deepcopy(model)
    assert_same(stored(model), stored(other))
    train(other, wrapped(other), 1)
    assert not torch.equal(model.up.weight.codes, other.up.weight.codes)
    assert_same(stored(model), stored(net(8)))
    assert isinstance(other.up.weight, nn.Parameter) and other.up.weight.requires_grad


@pytest.mark.parametrize("bits", BITS)
def test_a_state_dict_goes_through_a_file(bits, tmp_path):
    model, other = net(bits), net(bits, seed=1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(stored(model), stored(other))


def test_a_whole_model_goes_through_a_file():
    model, file = net(4, paper=True), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_same(stored(model), stored(other))
    assert isinstance(other.up.weight, nn.Parameter)


MISMATCHES = {
    "8 bits into 4": (lambda: net(8), lambda: net(4), "up.weight.*bits 8.* cannot be copied into .*bits 4.*same bits="),
    "the paper's into ours": (lambda: net(4, paper=True), lambda: net(4), "up.weight.*bits 4, paper.*the same bits="),
    "other activations": (lambda: net(4, activations=None), lambda: net(4),
                          "up.weight.*activations None.* cannot be copied into .*activations int8.*activations="),
    "numbers into 4": (net, lambda: net(4), "up.weight.*plain torch.float32 .*bits 4.*load numbers before"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", MISMATCHES)
def test_another_kind_is_not_loaded(case, assign):
    """Copied or assigned, the error names the parameter, both kinds and the remedy, and the weight stays."""
    source, target, message = MISMATCHES[case]
    model = copy.deepcopy(target())
    before = stored(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(source().state_dict(), assign=assign)
    after = stored(model)
    for name in ("up.weight.codes", "up.weight.scale", "up.weight.lowbit", "down.weight.lowbit"):
        assert torch.equal(before[name], after[name]), name


def test_low_bit_weights_are_not_loaded_as_numbers():
    model = net()
    before = model.up.weight.detach().clone()
    with pytest.raises(RuntimeError, match="up.weight.*bits 4.* cannot be copied into a plain torch.float32 .*"
                                           "quartet.direct.load"):
        model.load_state_dict(net(4).state_dict())
    assert torch.equal(model.up.weight, before)
    assert_same(stored(direct.load(model, net(4).state_dict())), stored(net(4)))


def test_other_sizes_are_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch"):
        direct.convert(Net(48), 8).load_state_dict(net(8).state_dict())


@pytest.mark.parametrize("loaded", [False, True])
def test_the_same_kind_can_be_assigned(loaded):
    model, state = net(4, seed=1), net(4).state_dict()
    if loaded:
        model = direct.load(net(seed=2), direct.export(model))
    model.load_state_dict(state, assign=True)
    assert_same(stored(model), stored(net(4)))
    assert model.up.weight.codes.data_ptr() == state["up.weight"].codes.data_ptr()
    with pytest.raises(RuntimeError, match="up.weight.*plain"):
        model.load_state_dict(net().state_dict(), assign=True)


def test_a_transformer_layer_trains_and_evaluates():
    """The output projection of its attention is used by weight, not called, and stays as it is."""
    torch.manual_seed(0)
    layer = direct.convert(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 8)
    assert set(direct.weights(layer)) == {"linear1.weight", "linear2.weight"}
    optimizer, x = wrapped(layer), torch.randn(4, 6, 32)
    losses = []
    for _ in range(10):
        loss = (layer(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = layer(x).detach()
    with torch.no_grad():
        assert torch.allclose(layer.eval()(x), trained, atol=1e-5)
    assert type(direct.bitnet(nn.TransformerEncoderLayer(32, 4, 64)).self_attn.out_proj) is not direct.BitLinear


def test_shared_memory_is_refused():
    model = net(4)
    for share in (model.up.weight.share_memory_, model.share_memory):
        with pytest.raises(NotImplementedError, match="cannot be moved to shared memory.*DistributedDataParallel"):
            share()


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="skip=\\(\\) to take all"):
        net(4, skip="*")
    with pytest.raises(ValueError, match=r"\['up.weight', 'down.weight', 'head.weight'\] are low-bit already"):
        direct.convert(net(4, skip=()), 8, skip=())
    with pytest.raises(ValueError, match="use 'int8' or None"):
        net(4, activations="int4")
    with pytest.raises(ValueError, match="there is no grid of 7 bits; .*nearest: 8"):
        net(7)
    broken = Net()
    broken.down.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'down' has NaNs"):
        direct.convert(broken, 4)
    assert not direct.weights(broken)
    with pytest.raises(NotImplementedError, match="dequantize"):
        net(4).up.weight + 1
    with pytest.raises(ValueError, match="has 31 features, the low-bit weight"):
        net(4).up(torch.ones(2, 31))
    with pytest.raises(ValueError, match="only dimension 0"):
        net(4).up.weight.detach().split(8, 1)


@pytest.mark.parametrize("function", [direct.convert, direct.bitnet, direct.ternarize, direct.export,
                                      direct.weight_bytes, lambda model: direct.load(model, {})])
def test_what_is_no_model_is_refused(function):
    with pytest.raises(TypeError, match=r"direct\.\w+ takes an nn.Module, not str"):
        function("model")


def test_a_name_to_skip_that_no_layer_has_is_told():
    with pytest.warns(UserWarning, match="skip='hed' leaves nothing .* 3 linear .*up, down, head") as told:
        net(4, skip=("up", "hed"))
    assert len(told) == 1 and told[0].filename.endswith("direct_models.py")


def test_bitnet_is_straight_through():
    model = direct.bitnet(net())
    assert type(model.up) is direct.BitLinear and type(model.head) is nn.Linear
    x = task()[0].requires_grad_()
    e = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    out = model.up(x)
    out.backward(e)
    w, (codes, scale) = model.up.weight.detach().double(), quantize_tokens(x.detach())
    mean = w.abs().mean()
    ternary, seen = (w / mean).round().clamp(-1, 1) * mean, (codes * scale).double()
    assert torch.allclose(out.double(), seen @ ternary.t() + model.up.bias, atol=1e-5)
    assert torch.allclose(x.grad.double(), e.double() @ ternary, atol=1e-5)
    assert torch.allclose(model.up.weight.grad.double(), e.double().t() @ seen, atol=1e-4)
