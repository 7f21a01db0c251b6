"""The kernels of low-bit weights: the reference's bits in Triton's interpreter, compiled for GPUs that are not here."""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import lowbit_cases as cases  # noqa: E402
import triton_offline  # noqa: E402

from quartet.kernels.reference.optim import lowbit as ref  # noqa: E402
from quartet.kernels.triton.lowbit import ops as lowbit  # noqa: E402

SCRIPT = Path(__file__).with_name("lowbit_cases.py")
OTHERS = (80, 89, 100, 120)
KERNELS = ("absorb", "expand", "rescale")
VARIANTS = {
    "8": ("8", 2048, {}), "ternary": ("ternary", 2048, {}), "4 wide": ("4", 8192, {}),
    "feedback": ("8", 8192, {"feedback": True}), "rare": ("ternary", 8192, {"radial_split": False}),
    "paper feedback": ("8", 2048, {"paper": True, "feedback": True}),
    "ragged": ("4", 4097, {"feedback": True}), "narrow": ("8", 64, {}),
}
EVERYWHERE = ("ternary", "feedback")


@pytest.mark.parametrize("name", cases.cases())
def test_triton_equals_the_reference(name, interpreted):
    assert not interpreted[name], "\n".join(interpreted[name])


# ---- without a GPU -----------------------------------------------------------------------------------------------


def weight(bits, rows, cols, paper=False):
    grid = ref.GRIDS[bits]
    packed = torch.zeros(rows, grid.columns(cols), dtype=torch.int8 if grid.width == 8 else torch.uint8)
    return packed, torch.ones(1 if paper else rows), grid


def launches(bits, cols, feedback=False, paper=False, radial_split=True, rows=16):
    packed, scale, grid = weight(bits, rows, cols, paper)
    residual = torch.zeros(rows, cols, dtype=torch.int8) if feedback else None

    def call():
        lowbit.dequantize(packed, scale, grid, cols, paper)
        lowbit.absorb(packed, scale, torch.zeros(rows, cols), residual, grid, cases.DRAW, paper=paper,
                      radial_split=radial_split, rescale=True)

    with mock.patch.object(lowbit, "INTERPRETED", SimpleNamespace(value=True)):
        return triton_offline.launches(call)


@cache
def compiled(name, capability):
    bits, cols, options = VARIANTS[name]
    with mock.patch.dict(triton_offline.POINTERS, {torch.int16: "*i16"}):
        return {launch.kernel.__name__: triton_offline.compile_for(launch, capability)
                for launch in launches(bits, cols, **options)}


def spills(kernel):
    return {"LDL", "STL"} & {i.split(".")[0] for i in kernel.instructions} or kernel.local


@pytest.mark.parametrize("name", VARIANTS)
def test_hopper_keeps_all_in_registers(name):
    for label, kernel in compiled(name, 90).items():
        assert not spills(kernel), f"{label}: {kernel.registers} registers"
        assert len(kernel.instructions) > 50 and "STG" in {i.split(".")[0] for i in kernel.instructions}


@pytest.mark.parametrize("capability", OTHERS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_other_gpus_keep_all_in_registers(name, capability):
    for label, kernel in compiled(name, capability).items():
        assert not spills(kernel), f"{label}: {kernel.registers} registers"


def test_every_kernel_is_compiled():
    assert {label for name in VARIANTS for label in compiled(name, 90)} == set(KERNELS)


@pytest.mark.parametrize("name", ["8", "ternary", "feedback"])
def test_registers_leave_room_for_four_programs(name):
    """On a multiprocessor: of 256 threads, which have 65536 registers."""
    assert compiled(name, 90)["absorb"].registers <= 64


def test_products_and_sums_are_not_fused():
    for bits, cols, options in VARIANTS.values():
        for launch in launches(bits, cols, **options):
            assert launch.keywords["enable_fp_fusion"] is False


def test_changes_of_scale_are_launched_only_when_asked_for():
    assert [x.kernel.__name__ for x in launches("8", 64)] == ["expand", "absorb", "rescale"]
    assert [x.kernel.__name__ for x in launches("8", 64, paper=True)] == ["expand", "absorb"]


def test_what_does_not_fit_is_named():
    packed, scale, grid = weight("4", 3, 10)
    options = {"paper": False, "radial_split": True, "rescale": False}

    def absorb(*parts):
        return lowbit.absorb(*parts, grid, cases.DRAW, **options)

    with pytest.raises(ValueError, match=r"run on a GPU, not on cpu; use quartet.kernels.reference.optim.lowbit"):
        absorb(packed, scale, torch.zeros(3, 10), None)
    with pytest.raises(ValueError, match=r"packed codes of a 4 weight of 3 rows and 12 columns are uint8 \[3, 6\]"):
        absorb(packed, scale, torch.zeros(3, 12), None)
    with pytest.raises(ValueError, match="the new numbers.* are float32 .*not bfloat16"):
        absorb(packed, scale, torch.zeros(3, 10, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match="residuals.* are int8 .*not uint8"):
        absorb(packed, scale, torch.zeros(3, 10), torch.zeros(3, 10, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"scales .*\[3\].*not float32 \[1\]"):
        lowbit.dequantize(packed, scale[:1], grid, 10, False)
    assert "at most" in lowbit.refusal(torch.device("cuda"), 1 << 31, 8)
    assert lowbit.refusal(torch.device("cuda"), 1 << 20, 1 << 16) is None
