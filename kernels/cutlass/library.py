"""A compiled kernel, opened: typed calls into its C interface, and its status codes as errors."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from quartet.kernels.build_cache import RELOCATE, BuildError
from quartet.kernels.cutlass.build import build
from quartet.kernels.cutlass.configuration import Configuration

# cutlass::Status, in its order
STATUS = ("success", "a misaligned operand", "an invalid data type", "an invalid layout", "an invalid problem",
          "an unsupported operation", "a null workspace", "an internal error", "a device of another architecture",
          "a driver that is too old", "insufficient device memory", "an invalid argument")
_ANEW = f"run `quartet cache clear`, or {RELOCATE}"
SUCCESS, MISALIGNED, INTERNAL, INVALID = 0, 1, 7, 11
_REMEDY = {
    MISALIGNED: "pointers have to be multiples of 16 bytes and rows whole 16-byte units: copy views with .clone()",
    INTERNAL: "CUDA refused the launch: see whether the driver is as new as nvcc (nvidia-smi names its CUDA version) "
              "and whether an earlier kernel failed (CUDA_LAUNCH_BLOCKING=1 shows which)",
    INVALID: "Configuration.supports(m, n, k) names the sizes it takes",
}


class KernelError(RuntimeError):
    """CUTLASS refused or failed; the message names the kernel, the sizes and what can be done."""


class Problem(ctypes.Structure):
    """``Problem`` of the template: device pointers, row strides in elements, and extents."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "a_scales", "b", "b_scales", "c", "bias", "d", "alpha")),
        *((name, ctypes.c_int64) for name in ("lda", "ldb", "ldc", "ldd")),
        *((name, ctypes.c_int32) for name in ("m", "n", "k", "device", "multiprocessors")),
    ]

    @classmethod
    def contiguous(cls, m: int, n: int, k: int) -> Problem:
        """Extents and the strides of contiguous matrices; no pointers."""
        return cls(m=m, n=n, k=k, lda=k, ldb=k, ldc=n, ldd=n)


_PROBLEM = ctypes.POINTER(Problem)
_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "name": (ctypes.c_char_p, ()),
    "can_implement": (_INT, (_PROBLEM,)),
    "workspace_size": (_LONG, (_PROBLEM,)),
    "shared_memory": (_LONG, ()),
    "stages": (_INT, ()),
    "scale_size": (_LONG, (_INT, _INT, _INT)),
    "scale_offset": (_LONG, (_INT, _INT, _INT, _INT, _INT)),
    "run": (_INT, (_PROBLEM, _POINTER, _POINTER)),
}


class Library:
    """One kernel's shared object. Everything but :meth:`run` works without a GPU.

    Raises BuildError when the object does not open or is another kernel's.
    """

    def __init__(self, configuration: Configuration, path: Path) -> None:
        self.configuration, self.path = configuration, path
        try:
            shared = ctypes.CDLL(str(path))
            self._functions = {name: getattr(shared, f"quartet_{name}") for name in _SIGNATURES}
        except (OSError, AttributeError) as error:
            raise BuildError(f"cannot open the kernel {configuration.name}: {error}; {_ANEW}") from error
        for name, function in self._functions.items():
            function.restype, function.argtypes = _SIGNATURES[name]
        found = self._functions["name"]().decode()
        if found != configuration.name:
            raise BuildError(f"{path} holds the kernel {found}, not {configuration.name}; {_ANEW}")

    def can_implement(self, problem: Problem) -> int:
        """CUTLASS's status for a problem: 0 when the kernel computes it. Null pointers count as aligned."""
        return int(self._functions["can_implement"](problem))

    def workspace_size(self, problem: Problem) -> int:
        """Bytes of device memory that :meth:`run` needs beside its operands."""
        return int(self._functions["workspace_size"](problem))

    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory a thread block."""
        return int(self._functions["shared_memory"]())

    def stages(self) -> int:
        """Steps along K that are in shared memory at once."""
        return int(self._functions["stages"]())

    def scale_size(self, operand: int, rows: int, k: int) -> int:
        """Bytes of the scale factors of operand 0 (A) or 1 (B) with so many rows, padding included."""
        return int(self._functions["scale_size"](operand, rows, k))

    def scale_offset(self, operand: int, rows: int, k: int, row: int, column: int) -> int:
        """Where the scale factor of element ``[row, column]`` of operand 0 (A) or 1 (B) lies, in bytes."""
        return int(self._functions["scale_offset"](operand, rows, k, row, column))

    def run(self, problem: Problem, workspace: int | None, stream: int) -> None:
        """Enqueue the product on a CUDA stream. Raises KernelError when CUTLASS or CUDA refuse."""
        self.check(int(self._functions["run"](problem, workspace, stream)), problem)

    def check(self, status: int, problem: Problem) -> None:
        """Raise KernelError unless ``status`` is success."""
        if status == SUCCESS:
            return
        what = STATUS[status] if 0 <= status < len(STATUS) else "an unknown status"
        strides = ", ".join(f"{name} = {getattr(problem, name)}" for name in ("lda", "ldb", "ldc", "ldd"))
        raise KernelError(
            f"{self.configuration.name} reports {what} (cutlass::Status {status}) for M = {problem.m}, "
            f"N = {problem.n}, K = {problem.k}, {strides}; {_REMEDY.get(status, 'choose another configuration')}")


@cache
def load(configuration: Configuration) -> Library:
    """The kernel, built if need be, with a warning that says so, and opened. Raises BuildError."""
    return Library(configuration, build(configuration, announce=True).path)
