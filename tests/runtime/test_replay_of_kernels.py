"""The Triton providers of the ops, recorded and repeated on the host: the driver is given what Python gave it.

Every kernel is one that writes down its parameters. What Python passes and what a plan passes then have to be the same
numbers, the same arguments and the same places in results, with temporaries in the same pattern.
"""

import ctypes
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from quartet.cli.selftest.ops import examples  # noqa: E402
from quartet.kernels.launcher import Function, launch  # noqa: E402
from quartet.kernels.triton import draws, host  # noqa: E402
from quartet.kernels.triton.bytes import rows, tensors, tiles  # noqa: E402
from quartet.kernels.triton.launch import flat  # noqa: E402
from quartet.kernels.triton.quantize import cast, fold, groups, ops, rotations  # noqa: E402
from quartet.lowering.ir.ops import core, fp8  # noqa: E402
from quartet.runtime.replay.recorder import tensors_of  # noqa: E402

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
              pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of this process is a real one")]
FACES = (ops, rotations, cast, groups, draws, rows, tiles, tensors)
CPU = torch.device("cpu")
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p))


@pytest.fixture
def passed(monkeypatch, driver):
    """(kernel, parameters) of every launch, with the grid among the parameters."""
    log, functions = [], {}

    def function(name, kinds):
        def note(program, parameters):
            log.append((name, [ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_int64))[0] for i in range(count)]))

        count = len(kinds)
        made = KERNEL(note)
        functions[name, kinds] = made, Function(name, ctypes.cast(made, ctypes.c_void_p).value, 32, 0, kinds)
        return functions[name, kinds]

    def stand_in(kernel, grid, arguments, **constants):
        given = [*grid, *(value for value in flat(arguments) if value is not None)]
        kinds = tuple("*" if isinstance(value, torch.Tensor) else "fp64" if isinstance(value, float) else "i64"
                      for value in given)
        name = f"{kernel.__name__} {constants}"
        launch((functions.get((name, kinds)) or function(name, kinds))[1], (1,), given)

    for face in FACES:
        monkeypatch.setattr(face, "launch", stand_in)
    monkeypatch.setattr(host, "INTERPRETED", SimpleNamespace(value=True))
    return log


def cases():
    for op, arguments in examples(CPU):
        for provider in op.providers:
            if provider.replayed and provider.name == "triton":
                yield op, provider, arguments
    yield core.sign_table, core.sign_table.providers[0], (torch.tensor(77), 3, 5, 32)
    x = torch.randn(32, 96, dtype=torch.bfloat16)
    ends = torch.tensor([32, 96], dtype=torch.int32)
    columns = x.t().contiguous().t()
    yield fp8.fp8_cast_groups, fp8.fp8_cast_groups.providers[0], (columns, "e4m3/row fp32 amax nearest", ends)
    yield fp8.fp8_cast, fp8.fp8_cast.providers[0], (x, torch.ones(1), "e4m3", True, True)
    yield (fp8.fp8_cast_by_rows, fp8.fp8_cast_by_rows.providers[0],
           (x, x[:, 0].abs(), "e4m3/tensor fp32 amax nearest", True, True))
    yield (fp8.fp8_casts_by_rows, fp8.fp8_casts_by_rows.providers[0],
           ([x, -x], [x[:, 0].abs()] * 2, "e4m3/tensor fp32 amax nearest", True, True))
    index = torch.tensor([3, -1, 0])
    yield fp8.fp8_cast_rows, fp8.fp8_cast_rows.providers[0], (x, torch.ones(1), "e4m3", True, True, index)
    yield (fp8.fp8_casts_by_known, fp8.fp8_casts_by_known.providers[0],
           ([x, -x], [torch.ones(1)] * 2, "e4m3/tensor fp32 delayed nearest", 0, True, True))
    yield fp8.fp8_row_major, fp8.fp8_row_major.providers[0], (torch.zeros(32, 64, dtype=torch.float8_e4m3fn).t(),)


CASES = list(cases())


def storages(tensors):
    """(address, bytes) of each tensor's memory."""
    return [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]


def place(address, known):
    """Which memory an address is in, and where."""
    return next(((i, address - start) for i, (start, size) in enumerate(known) if 0 <= address - start < size), None)


@pytest.mark.parametrize(("op", "provider", "arguments"), CASES,
                         ids=[f"{op.name}-{i}" for i, (op, *_) in enumerate(CASES)])
def test_the_driver_is_given_what_python_gave_it(op, provider, arguments, passed, declare):
    called, counts = declare(provider.run, op.schema)
    made, given = [], []
    for _ in range(3):
        passed.clear()
        result = called(*arguments)
        made.append(result if isinstance(result, (tuple, list)) else (result,))
        given.append(list(passed))
    assert counts().replays == 1 and counts().plans == 1
    for recorded, repeated in zip(*made[1:], strict=True):
        assert (repeated.shape, repeated.stride(), repeated.dtype, repeated.storage_offset()) == (
            recorded.shape, recorded.stride(), recorded.dtype, recorded.storage_offset())
    assert given[1] and [name for name, _ in given[1]] == [name for name, _ in given[2]]
    pairs = [pair for before, after in zip(*given[1:], strict=True) for pair in zip(before[1], after[1], strict=True)]
    read = list(tensors_of(arguments))
    lasting = [fold.table(CPU), fold.inexact_blocks(CPU)]
    there, results = storages([*read, *lasting]), [storages(some) for some in made[1:]]
    temporaries = {}
    for before, after in pairs:
        if place(before, there) is not None:
            assert after == before
        elif place(before, results[0]) is not None:
            assert place(after, results[1]) == place(before, results[0])
        elif before != after:
            assert place(after, there) is None and place(after, results[1]) is None
            assert temporaries.setdefault(before, after) == after


def test_every_replayed_provider_is_here_or_on_blackwell():
    from quartet.lowering.ir.op import ops as every

    named = {op.name for op in every() for one in op.providers if one.replayed and one.name == "triton"}
    assert named - {op.name for op, *_ in CASES} <= {"fp4_dot"}
