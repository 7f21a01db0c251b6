"""What a device is called and what it can do."""

import pytest
import torch

from quartet.runtime.devices import FEATURES, Target
from quartet.runtime.gpus import AMD, ARCHITECTURES

FP8 = {"fp8 tensor cores", "fp8 conversions"}
ALWAYS = {"nvidia instructions", "int8 tensor cores"}


@pytest.mark.parametrize("name, features", [
    ("sm_80", ALWAYS),
    ("sm_89", ALWAYS | FP8),
    ("sm_90a", ALWAYS | FP8 | {"fp8 grouped products", "fp8 block scales"}),
    *((name, ALWAYS | FP8 | {"block-scaled tensor cores"}) for name in ("sm_100a", "sm_103", "sm_120f", "sm_121")),
    *((name, {"fp8 conversions"}) for name in AMD),
    ("cpu", {"fp8 conversions", "int8 tensor cores"}),
])
def test_what_a_target_has(name, features):
    assert Target.named(name).features == features


@pytest.mark.parametrize("name", [*ARCHITECTURES, *AMD, "cpu"])
def test_a_name_is_read_and_written_the_same_way(name):
    assert str(Target.named(name)) == name


@pytest.mark.parametrize("architecture, capability", [
    ("sm_75", (7, 5)), ("sm_90", (9, 0)), ("sm_121", (12, 1)), ("gfx950", None), (None, None)])
def test_only_nvidia_gpus_have_a_compute_capability(architecture, capability):
    assert Target("cuda", architecture).capability == capability


@pytest.mark.parametrize("name", FEATURES)
def test_what_lacks_a_feature_says_who_and_why(name):
    older, elsewhere, foreign = (target.lacks(name) for target in (
        Target("cuda", "sm_70"), Target("xpu"), Target("cuda", "gfx942")))
    assert older is None or "7.0" in older
    assert elsewhere is None or elsewhere.endswith(("xpu", "this device"))
    assert foreign is None or foreign.endswith("; this PyTorch is built for ROCm")
    assert (elsewhere is None) == (foreign is None) == (name == "fp8 conversions")


def test_what_is_not_here_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = Target.of(torch.device("cuda"))
    assert target.features == {"fp8 conversions"}
    assert "no CUDA device is here" in target.lacks("fp8 tensor cores")


def test_a_gpu_under_rocm_has_its_own_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = type("Properties", (), {"gcnArchName": "gfx942:sramecc+:xnack-"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target = Target.of(torch.device("cuda"))
    assert (str(target), target.capability) == ("gfx942", None)
    assert target.lacks("fp8 tensor cores") == "written for NVIDIA's FP8 formats; this PyTorch is built for ROCm"
