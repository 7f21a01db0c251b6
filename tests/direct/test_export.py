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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_no_exports_are_named(tmp_path, suffix):
    pytest.importorskip("safetensors")
    file = tmp_path / f"model.{suffix}"
    for content in (b"", b"junk", b'{"a": 1}'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"model.{suffix} is no export"):
            direct.load(net(), file)
    with pytest.raises(OSError, match=f"none/model.{suffix}"):
        direct.export(net(4), tmp_path / "none" / f"model.{suffix}")
    with pytest.raises(OSError, match=f"other.{suffix}"):
        direct.load(net(), tmp_path / f"other.{suffix}")


def test_a_checkpoint_of_more_than_tensors_is_no_export(tmp_path):
    torch.save({"model": net().state_dict()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        direct.load(net(), tmp_path / "model.pt")


def test_a_load_that_is_refused_converts_nothing():
    plain, model = direct.export(net(4)), net()
    model.down = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'down.weight'"):
        direct.load(model, plain)
    assert not direct.weights(model)


def test_ternary_weights_come_of_low_bit_ones():
    with pytest.raises(ValueError, match="no low-bit weight; direct.convert"):
        direct.ternarize(net())


def test_ternary_inference_from_8_bits():
    model = net(8)
    before = model.up.weight.dequantize()
    direct.ternarize(model)
    w = model.up.weight
    assert w.bits == "ternary" and w.codes.nbytes == 64 * 32 // 4
    mean = before.abs().mean(1, keepdim=True)
    assert torch.allclose(w.dequantize(), (before / mean).round().clamp(-1, 1) * mean)
    assert model(task()[0]).isfinite().all()
