"""FP8 in blocks and tiles, FP8 and INT8 rows: the reference's bits in Triton's interpreter, compiled for other GPUs."""

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import byte_cases as cases  # noqa: E402
import triton_offline  # noqa: E402

from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.bytes import rows, tensors, tiles  # noqa: E402

SCRIPT = Path(__file__).with_name("byte_cases.py")
MXFP8, BLOCK = cases.BLOCKS[:2]
INT8 = cases.ROWS[0]
X = torch.empty(64, 8192, dtype=torch.bfloat16)
MULTIPLIERS = torch.empty(3, 4, 1)
CALLS = {
    "rows": lambda: tiles.quantize(X, BLOCK),
    "columns": lambda: tiles.quantize(X.t(), MXFP8),
    "both": lambda: tiles.quantize_both(X, MXFP8, BLOCK),
    "int8 a row": lambda: rows.quantize(X, INT8),
    "casts": lambda: tensors.cast([X, X, X], MULTIPLIERS, torch.float8_e4m3fn, plain=True, turned=True),
    "casts that see": lambda: tensors.cast([X, X, X], MULTIPLIERS, torch.float8_e4m3fn, plain=True, turned=True,
                                           seen=torch.empty(3, 1, 1)),
    "casts by rows": lambda: tensors.cast_by_magnitudes([X, X, X], [X[0], X[1], X[2]], cases.TENSORS[0], plain=True,
                                                        turned=True),
    "known scales": lambda: tensors.scales_by_known([X, X, X], [torch.ones(1)] * 3, cases.DELAYED[0], 1),
    "scales": lambda: tensors.scales_of([X[0], X[1], X[2]], cases.TENSORS[0]),
    "magnitudes": lambda: tensors.largest_magnitudes([X, X, X]),
}


@pytest.mark.parametrize("name", cases.cases())
def test_triton_equals_the_reference(name, interpreted):
    assert not interpreted[name], "\n".join(interpreted[name])


def test_the_cases_have_what_is_hard():
    """Every exponent at which a scale changes, scales at both ends, NaN and infinities, subnormal numbers, ties."""
    x = cases.edges(150)
    limits = torch.finfo(torch.float32)
    assert {448.0, 57344.0, 127.0} <= set(x[:, 3].abs().tolist()) and (x.abs() == limits.max).any()
    assert ((x != 0) & (x.abs() < limits.smallest_normal)).any()
    scales = cases.ref.quantize(x, MXFP8)[1]
    assert scales.min() == 0 and scales.max() > 240
    multiplier, _ = cases.ref.formats.scales.fp32_scale(x, INT8)
    codes = x[:15] * multiplier[:15]
    assert (codes.abs().frac() == 0.5).any() and cases.broken(20, 150).isnan().any()


# ---- without a GPU -----------------------------------------------------------------------------------------------


@cache
def compiled(name, capability):
    """Machine code and PTX of a call's one kernel, with what the GPU converts by itself."""
    (launch,) = triton_offline.launches(CALLS[name])
    assert launch.keywords["enable_fp_fusion"] is False
    if "HARDWARE" in launch.keywords:
        launch.keywords["HARDWARE"] = capability >= 89
    return triton_offline.compile_with_ptx(launch, capability)


def test_magnitudes_are_read_of_weights_as_they_lie():
    """No copy of those that lie transposed; one of what has gaps."""
    stack = torch.empty(3, 8, 16)
    xs = [stack, stack.mT, stack.permute(2, 0, 1), stack[:, :, 1:]]
    (launch,) = triton_offline.launches(lambda: tensors.largest_magnitudes(xs))
    assert [read.data_ptr() == stack.data_ptr() for read in launch.arguments[0]] == [True, True, True, False]
    assert all(read.is_contiguous() for read in launch.arguments[0])


@pytest.mark.parametrize("name", ["casts that see", "known scales"])
def test_kernels_for_several_are_given_aligned_tables(name):
    """They are compiled once, however many tensors there are."""
    (launch,) = triton_offline.launches(CALLS[name])
    assert all(table.data_ptr() % 16 == 0 for table in launch.arguments if isinstance(table, torch.Tensor))


@pytest.mark.parametrize("name, capability, registers", [
    ("rows", 90, 64), ("columns", 90, 128), ("both", 90, 128), ("int8 a row", 90, 64), ("both", 80, 128),
    ("casts", 90, 64), ("casts that see", 90, 80), ("known scales", 90, 64), ("scales", 90, 64),
    ("magnitudes", 90, 64), ("casts", 80, 128)])
def test_all_stays_in_registers_that_leave_room_for_another_program(name, capability, registers):
    """On a multiprocessor: for two of 256 threads with 128, three with 80, four with 64."""
    kernel, _ = compiled(name, capability)
    assert (kernel.stack, kernel.local) == (0, 0) and kernel.registers <= registers, f"{kernel.registers} registers"


@pytest.mark.parametrize("name", ["rows", "columns", "both", "int8 a row", "scales", "magnitudes"])
def test_hopper_reads_sixteen_bytes_at_a_time(name):
    _, ptx = compiled(name, 90)
    assert set(re.findall(r"ld\.global\.(\S+)", ptx)) == {"v4.b32"}


def test_scales_of_rows_are_stored_where_they_are_made():
    """No thread waits for another's."""
    assert "BAR" not in compiled("rows", 90)[0].instructions


@pytest.mark.parametrize("name", ["columns", "casts", "casts that see", "casts by rows"])
def test_transposed_codes_are_written_as_words_side_by_side(name):
    _, ptx = compiled(name, 90)
    assert "st.global.v4.b32" in ptx


def test_what_has_no_scale_of_one_tensor_is_refused():
    for call, message in ((lambda: tensors.largest_magnitudes([X, X.float()]), "of one dtype"),
                          (lambda: tensors.scales_of([X[0].double()], cases.TENSORS[0]), "of one dtype"),
                          (lambda: tensors.cast([X[:3]], MULTIPLIERS, torch.float8_e5m2, plain=True, turned=True),
                           "rows are a multiple of four"),
                          (lambda: tensors.cast([X] * 2, MULTIPLIERS[:1], torch.float8_e5m2, plain=True, turned=True),
                           "2 tensors are cast by one of 4 numbers each, got "),
                          (lambda: tensors.cast_by_magnitudes([X], [], cases.TENSORS[0], plain=True, turned=True),
                           "at most 8192 magnitudes each, got"),
                          (lambda: tensors.cast_by_magnitudes([X], [X.expand(2, -1, -1)], cases.TENSORS[0], plain=True,
                                                              turned=True), "at most 8192 magnitudes each, got")):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_gpu_converts_where_it_can():
    for capability in (90, 80):
        assert ("cvt.rn.satfinite.e4m3x2.f32" in compiled("both", capability)[1]) == (capability == 90)


@pytest.mark.parametrize("call, message", [
    (lambda x: tiles.quantize(x, INT8), "writes e4m3 and e5m2 in blocks, not 'int8/row fp32 amax nearest'"),
    (lambda x: tiles.quantize(x, QuantSpec("e4m3", rule="floor", mask=True)), "writes no masks"),
    (lambda x: tiles.quantize(x.double(), BLOCK), "reads float32, bfloat16 and float16, not float64"),
    (lambda x: tiles.quantize(x[0], BLOCK), r"2-D tensor, got \[16\]"),
    (lambda x: tiles.quantize(x, BLOCK), "run on a GPU, and the tensor .* is on cpu"),
    (lambda x: rows.quantize(x, BLOCK), "kernel for rows writes e4m3, e5m2 and int8 .* not 'e4m3/128"),
    (lambda x: rows.quantize(x.long(), INT8), "reads float32, bfloat16 and float16, not int64"),
    (lambda x: rows.quantize(x[:, :0], INT8), r"at least one column, got \[4, 0\]"),
])
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 16))
