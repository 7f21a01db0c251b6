"""Exports: plain tensors, files, and ternary weights from 8-bit ones."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import BITS, assert_same, net, task, train, wrapped  # noqa: E402

from quartet import direct  # noqa: E402


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_an_export_comes_back(bits, paper, suffix, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    model, file = net(bits, paper=paper), tmp_path / f"model.{suffix}"
    train(model, wrapped(model), 1)
    plain = direct.export(model, file)
    assert all(type(value) is torch.Tensor for value in plain.values())
    other = direct.load(net(seed=4), file)
    assert_same(plain, direct.export(other))
    x = task()[0]
    assert torch.equal(model(x), other(x))
    assert other.up.weight.kind() == model.up.weight.kind()


def test_an_export_takes_no_more_bytes_than_the_model():
    model = net("ternary")
    plain = direct.export(model)
    assert plain["up.weight.codes"].data_ptr() == model.up.weight.codes.data_ptr()
    assert plain["up.weight.codes"].nbytes == 64 * 32 // 4


def test_a_loaded_export_goes_on_training():
    model = direct.load(net(), direct.export(net(4)))
    losses = train(model, wrapped(model), 20)
    assert losses[-1] < losses[0]


def test_the_activations_option_is_kept():
    model = net(4, activations=None)
    assert direct.load(net(), direct.export(model)).up.weight.activations is None


def test_broken_exports_say_what_is_wrong():
    plain = direct.export(net(4))
    with pytest.raises(ValueError, match="lacks up.weight.scale"):
        direct.read({k: v for k, v in plain.items() if k != "up.weight.scale"})
    with pytest.raises(ValueError, match="not those of 32 columns of 4 bits"):
        direct.read(plain | {"up.weight.codes": plain["up.weight.codes"][:, :3]})
    with pytest.raises(ValueError, match="expected \\[grid"):
        direct.read(plain | {"up.weight.lowbit": torch.tensor([9, 32, 0, 0])})
    with pytest.raises(ValueError, match="the model no such parameter"):
        direct.load(torch.nn.Linear(2, 2), plain)
    with pytest.raises(RuntimeError, match="Missing key"):
        direct.load(net(), {k: v for k, v in plain.items() if k != "head.bias"})


def test_ternary_inference_from_8_bits():
    model = net(8)
    before = model.up.weight.dequantize()
    direct.ternarize(model)
    w = model.up.weight
    assert w.bits == "ternary" and w.codes.nbytes == 64 * 32 // 4
    mean = before.abs().mean(1, keepdim=True)
    assert torch.allclose(w.dequantize(), (before / mean).round().clamp(-1, 1) * mean)
    assert model(task()[0]).isfinite().all()
