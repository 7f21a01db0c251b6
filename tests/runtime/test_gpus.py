"""The table of GPUs: what names mean which, figures that agree with each other, estimates of what is not in it."""

from types import SimpleNamespace

import pytest

from quartet.runtime import gpus
from quartet.runtime.devices import Target


@pytest.mark.parametrize("device, name", [
    ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", "a100 40gb"), ("A100-PCIE-40GB", "a100 40gb"),
    ("NVIDIA A100 80GB PCIe", "a100 pcie"), ("NVIDIA A30", "a30"), ("NVIDIA A10", "a10"), ("NVIDIA A10G", "a10g"),
    ("NVIDIA L4", "l4"), ("NVIDIA L40", "l40"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 3090", "rtx 3090"),
    ("NVIDIA GeForce RTX 4090", "rtx 4090"), ("NVIDIA GeForce RTX 5090", "rtx 5090"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100 pcie"), ("NVIDIA H100 NVL", "h100 nvl"),
    ("NVIDIA H800", "h100"), ("NVIDIA H20", "h20"), ("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", "h200 nvl"),
    ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA GH200 144G HBM3e", "gh200 144gb"), ("NVIDIA B200", "b200"),
    ("NVIDIA GB200", "gb200"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx pro 6000 server"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx pro 6000"),
    ("NVIDIA RTX 6000 Ada Generation", "rtx 6000 ada"), ("NVIDIA GB10", "gb10"),
])
def test_what_a_driver_calls_a_gpu(device, name):
    assert gpus.named(device).name == name


@pytest.mark.parametrize("device", [
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 2080 Ti", "GRID A100-40C", "NVIDIA A1000", "h1", "", "sm_90"])
def test_what_is_another_gpu(device):
    assert gpus.named(device) is None


@pytest.mark.parametrize("name", gpus.NAMES)
def test_a_gpu_is_a_target_by_its_name(name):
    for text in (name, name.upper(), name.replace(" ", "-")):
        target = Target.named(text)
        assert target.gpu.name == name and str(target) == target.gpu.architecture in gpus.ARCHITECTURES
        assert target.pretended and target.title == text


def test_every_architecture_has_a_gpu_that_stands_for_it():
    for name in gpus.ARCHITECTURES:
        assert Target.named(name).gpu.architecture == name and Target.named(name).title == name


def properties(gpu, name, **others):
    """What PyTorch says of a GPU of which the table has the speed."""
    made = {"major": gpu.capability[0], "minor": gpu.capability[1], "multi_processor_count": gpu.processors,
            "clock_rate": int(gpu.clock / 1e3), "memory_bus_width": 384,
            "memory_clock_rate": int(gpu.bandwidth * 8 / 384 / 2e3)}
    return SimpleNamespace(name=name, **(made | others))


@pytest.mark.parametrize("name", [name for name in gpus.NAMES if name not in ("a10g", "l40", "h20")])
def test_the_figures_of_the_table_and_the_rule_for_others_agree(name):
    """Within a tenth; three are made slower than their multiprocessors are."""
    gpu = gpus.named(name)
    other = "NVIDIA GeForce RTX of the future" if "geforce" in gpu.pattern else "NVIDIA of the future"
    made = gpus.of(properties(gpu, other))
    assert made.estimated and made.bandwidth == pytest.approx(gpu.bandwidth, rel=0.01)
    for dtype in ("bf16", "fp8", "int8"):
        assert made.operations(dtype) == pytest.approx(gpu.operations(dtype), rel=0.1), dtype
    assert (made.fp4 > 0) == (gpu.fp4 > 0) and made.fp4 <= 1.1 * gpu.fp4


def test_a_known_gpu_is_not_estimated():
    h100 = gpus.named("h100")
    assert gpus.of(properties(h100, "NVIDIA H100 80GB HBM3", clock_rate=1)) is h100


@pytest.mark.parametrize("name, others", [
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", {}), ("NVIDIA Next", {"clock_rate": 0}), ("NVIDIA Next", {"major": 7})])
def test_of_some_nothing_is_known(name, others):
    assert gpus.of(properties(gpus.named("h100"), name, **others)) is None


def test_properties_that_a_pytorch_does_not_tell_are_no_error():
    assert gpus.of(SimpleNamespace(name="NVIDIA Next", major=9, minor=0, multi_processor_count=132)) is None
