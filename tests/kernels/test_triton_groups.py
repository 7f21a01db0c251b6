"""FP8 rows with scales of groups: the reference's bits in Triton's interpreter, compiled for GPUs that are not here."""

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import group_cases as cases  # noqa: E402
import triton_offline  # noqa: E402

from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.quantize import groups  # noqa: E402

SCRIPT = Path(__file__).with_name("group_cases.py")
KERNELS = ["group_amax", "group_scales", "cast_groups"]
ENDS = torch.zeros(64, dtype=torch.int32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("name", cases.cases())
def test_triton_equals_the_reference(name, interpreted):
    assert not interpreted[name], "\n".join(interpreted[name])


def test_the_cases_have_what_is_hard():
    """Empty groups, groups that do not end with a tile or a word, tokens behind the last, one program of many groups"""
    known = cases.cases()
    several, bytes_, tail = (known[name].ends.tolist() for name in ("many groups", "e4m3-amax bytes", "a tail"))
    assert len(set(several)) < len(several) and any(end % 128 for end in several) and any(end % 4 for end in bytes_)
    assert tail[-1] < 528 - groups.CHUNK // 2
    x = known["e4m3-amax special"].x
    assert x.isnan().any() and x.isinf().any() and ((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).any()


# ---- without a GPU -----------------------------------------------------------------------------------------------


def launches(element="e4m3", dtype=torch.bfloat16, tokens=32768, rows=2048, count=64):
    x = torch.empty(tokens, rows, dtype=dtype).t()
    return triton_offline.launches(lambda: groups.quantize_groups(x, cases.SPECS[f"{element}-amax"], ENDS[:count]))


@cache
def compiled(element, dtype, tokens, rows, capability, count=64):
    """Machine code and PTX of each kernel, with what the GPU converts by itself."""
    found = {}
    for launch in launches(element, dtype, tokens, rows, count):
        if "HARDWARE" in launch.keywords:
            launch.keywords["HARDWARE"] = capability >= 89
        found[launch.kernel.__name__] = triton_offline.compile_with_ptx(launch, capability)
    assert list(found) == KERNELS
    return found


def check_registers(found):
    for name, (kernel, _) in found.items():
        assert (kernel.stack, kernel.local) == (0, 0), f"{name}: {kernel.registers} registers"
        assert len(kernel.instructions) > 50


def moves(ptx, what):
    return set(re.findall(rf"\b{what}\.global\.(\S+)", ptx))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_moves_sixteen_bytes_at_a_time(dtype):
    found = compiled("e4m3", dtype, 32768, 2048, 90)
    check_registers(found)
    for name in ("group_amax", "cast_groups"):
        wide = re.findall(r"ld\.global\.v4\.b32", found[name][1])
        assert len(wide) >= 4 and not {"b16", "u16"} & moves(found[name][1], "ld")
    assert moves(found["cast_groups"][1], "st") == {"v4.b32"}


@pytest.mark.parametrize("element", ("e4m3", "e5m2"))
def test_the_gpu_converts_where_it_can(element):
    for capability in (90, 80):
        _, ptx = compiled(element, torch.bfloat16, 32768, 2048, capability)["cast_groups"]
        assert (f"cvt.rn.satfinite.{element}x2.f32" in ptx) == (capability == 90)


@pytest.mark.parametrize("capability, tokens, rows", [
    (90, 4099, 33), (80, 32768, 2048), (89, 32768, 2048), (100, 32768, 2048), (120, 32768, 2048)])
def test_other_shapes_and_gpus_keep_all_in_registers(capability, tokens, rows):
    check_registers(compiled("e5m2" if capability == 80 else "e4m3", torch.bfloat16, tokens, rows, capability))


@pytest.mark.parametrize("tokens, rows, count", [(1, 1, 1), (16, 16, 2), (4099, 1, 128)])
def test_sizes_of_one_compile(tokens, rows, count):
    """An integer of 1 is a constant to Triton."""
    check_registers(compiled("e4m3", torch.bfloat16, tokens, rows, 90, count))


@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_leave_room_for_four_programs_of_the_passes_over_memory(dtype):
    """On a multiprocessor: of 256 threads, which have 65536 registers."""
    found = compiled("e4m3", dtype, 32768, 2048, 90)
    assert found["cast_groups"][0].registers <= 64 and found["group_amax"][0].registers <= 72


def test_products_are_not_fused():
    assert [launch.keywords["enable_fp_fusion"] for launch in launches()] == [False] * 3


def test_nothing_is_launched_for_nothing():
    assert [launch.kernel.__name__ for launch in launches(tokens=0)] == ["group_scales"]
    assert launches(rows=0) == []


@pytest.mark.parametrize("x, spec, ends, message", [
    (torch.zeros(4, 16), "e4m3/tensor fp32 amax nearest", ENDS, "no kernel quantises groups by 'e4m3/tensor fp32"),
    (torch.zeros(4, 16), "int8/row fp32 amax nearest", ENDS, "it takes e4m3/row or e5m2/row"),
    (torch.zeros(4, 16), "e4m3/32 e8m0 ceil nearest", ENDS, "use quartet.kernels.reference.products.grouped"),
    (torch.zeros(4, 16).double(), "e4m3/row fp32 amax nearest", ENDS, r"not torch.float64 \[4, 16\]"),
    (torch.zeros(16), "e4m3/row fp32 amax nearest", ENDS, r"2-D .*not torch.float32 \[16\]"),
    (torch.zeros(4, 16), "e4m3/row fp32 amax nearest", ENDS.long(), r"int32 \[E\] on cpu .*not torch.int64 \[64\]"),
    (torch.zeros(4, 16), "e4m3/row fp32 amax nearest", ENDS[:0], r"at least one group, not torch.int32 \[0\]"),
    (torch.zeros(4, 16), "e4m3/row fp32 amax nearest", ENDS, "run on a GPU, and the tensor .* is on cpu"),
])
def test_what_does_not_fit_is_named(x, spec, ends, message):
    with pytest.raises(ValueError, match=message):
        groups.quantize_groups(x, QuantSpec.parse(spec), ends)
