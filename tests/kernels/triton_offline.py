"""Compile a Triton kernel for a GPU that is not there, with the constants and types that ``ops`` launches it with."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelInterface

import quartet.kernels.triton as package
from quartet.kernels.triton import host

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
            torch.int64: "*i64", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
            torch.float8_e5m2: "*fp8e5"}
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


@dataclass
class Launch:
    """A kernel that ``ops`` launched, and what with."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """Registers, bytes of stack, shared and local memory of a thread or block, and the names of the instructions."""

    registers: int
    stack: int
    shared: int
    local: int
    instructions: list[str]


def launched_kernels() -> set[str]:
    """Names of the package's kernels that its Python code launches."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules = [importlib.import_module(module.name) for module in found]
    code = "".join(map(inspect.getsource, modules))
    names = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {name for name in names if re.search(rf"\b{name}\[|launch\((\w+\.)?{name}\b", code)}


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The launches that a call on CPU tensors would make on a GPU; nothing is computed."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: found.append(Launch(kernel, arguments, keywords))

    with (mock.patch.object(KernelInterface, "__getitem__", record),
          mock.patch.object(host, "INTERPRETED", SimpleNamespace(value=True))):  # lets CPU tensors through
        call()
    return found


def _source(launch: Launch) -> ASTSource:
    """Types, constants and divisibilities as a launch specialises them: integers 1 and None are constants."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.keywords
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(names):
        if name in launch.keywords:
            signature[name], constants[(at,)] = "constexpr", values[name]
        elif isinstance(values[name], tuple):
            signature[name] = tuple(_specialised(value, (at, i), constants, attributes)
                                    for i, value in enumerate(values[name]))
        else:
            signature[name] = _specialised(values[name], (at,), constants, attributes)
    return ASTSource(launch.kernel, signature, constants, attributes)


def _specialised(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> str:
    """The type of an argument, which is noted as a constant or as divisible."""
    kind = _kind(value)
    if kind is None:
        constants[path] = value
        return "constexpr"
    aligned = value.data_ptr() if isinstance(value, Tensor) else value
    if isinstance(aligned, int) and aligned % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return kind


def _kind(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not isinstance(value, bool) and value != 1:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return None


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Down to the machine code of compute capability ``capability``, 90 for 9.0."""
    return compile_with_ptx(launch, capability)[0]


def compile_with_ptx(launch: Launch, capability: int) -> tuple[Compiled, str]:
    """:func:`compile_for`, and the PTX."""
    options = {name: value for name, value in launch.keywords.items() if name in OPTIONS}
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
                       for option in ("-res-usage", "-sass"))
    resources = RESOURCES.search(usage)
    assert resources is not None, f"cuobjdump -res-usage said\n{usage}"
    return Compiled(*map(int, resources.groups()), INSTRUCTION.findall(code)), compiled.asm["ptx"]
