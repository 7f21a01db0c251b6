"""What the CUTLASS tests share: why they cannot run, CUTLASS's host reference, a census of SASS, and a fake nvcc."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import subprocess
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quartet.kernels.build_cache import build_once, fingerprint, run_compiler, target_of
from quartet.kernels.cutlass import gemm
from quartet.kernels.cutlass.toolchain import toolchain, unavailable
from quartet.kernels.reference import dequantize, e2m1_decode, quantize, unpack_nibbles
from quartet.kernels.spec import QuantSpec

MISSING = unavailable("sm_100a")
REQUIRED = os.environ.get("QUARTET_REQUIRE_CUTLASS") == "1"  # then a test that cannot compile fails
needs_cutlass = pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=str(MISSING))

HOST = Path(__file__).parents[1] / "kernels" / "cutlass_host.cpp"
MX_SPEC = {"mxf4": QuantSpec(rule="ceil"), "mxf8": QuantSpec(element="e4m3", rule="ceil")}
KIND_CODE = {"mxf4": 0, "nvf4": 1, "mxf8": 2}
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
MNEMONIC = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Census:
    """Registers, stack and local bytes of the kernel in an object, and how often each whole mnemonic occurs."""

    registers: int
    stack: int
    local: int
    mnemonics: Counter[str]


def census(path: Path) -> Census:
    """Disassemble the one kernel of a shared object."""
    tool = shutil.which("cuobjdump") or _triton_cuobjdump()
    usage = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    ((registers, stack, local),) = RESOURCES.findall(usage)
    sass = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    return Census(int(registers), int(stack), int(local), Counter(MNEMONIC.findall(sass)))


def _triton_cuobjdump() -> str:
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which brings one, is installed")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


class Host:
    """CUTLASS's layouts and GEMM on the CPU."""

    def __init__(self, shared: ctypes.CDLL) -> None:
        self._offsets, self._decode, self._gemm = shared.host_offsets, shared.host_decode, shared.host_gemm
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._offsets.argtypes = (integer, integer, integer, integer, integer, pointer)
        self._decode.argtypes = (pointer, integer, pointer)
        self._gemm.argtypes = (integer, pointer, pointer, pointer, pointer, ctypes.c_float, integer, integer, integer,
                               pointer)
        self._offsets.restype = self._decode.restype = self._gemm.restype = None

    def offsets(self, layout: int, operand: int, block: int, rows: int, k: int) -> Tensor:
        """int64 ``[rows, k/block]``: where CUTLASS's layout of sm_100 or sm_103 puts each scale of A (0) or B (1)."""
        out = torch.full((rows, k // block), -1, dtype=torch.int64)
        self._offsets(layout, operand, block, rows, k, out.data_ptr())
        return out

    def decode(self, packed: Tensor) -> Tensor:
        """fp32 values of packed E2M1, two a byte, by CUTLASS's sub-byte iterator."""
        out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1])
        self._decode(packed.data_ptr(), out.numel(), out.data_ptr())
        return out

    def gemm(self, kind: str, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: float) -> Tensor:
        """fp32 ``alpha · A · Bᵀ`` of codes and swizzled scales by CUTLASS's host GEMM."""
        m, n, k = a.shape[0], b.shape[0], a.shape[1] * (1 if kind == "mxf8" else 2)
        out = torch.zeros(m, n)
        pointers = (x.data_ptr() for x in (a, a_scales, b, b_scales))
        self._gemm(KIND_CODE[kind], *pointers, alpha, m, n, k, out.data_ptr())
        return out


@cache
def host() -> Host:
    """The host reference, compiled by g++ with the include folders that nvcc would give it."""
    tools = toolchain()
    dry = subprocess.run([str(tools.nvcc), "--dryrun", "-c", "-x", "c++", str(HOST)], capture_output=True, text=True)
    folders = re.findall(r'"(?:-I)?(/[^"]+)"', "".join(re.findall(r"INCLUDES=(.*)", dry.stderr)))
    folders += [tools.include, tools.include.parent / "tools" / "util" / "include"]
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-fpermissive", "-w", "-shared", *(f"-I{f}" for f in folders),
               str(HOST)]
    target = target_of("cutlass_host-" + fingerprint(HOST.read_bytes(), " ".join(command).encode(),
                                                     tools.nvcc_version.encode(), tools.cutlass_version.encode()))

    def compile_(path: Path) -> None:
        run_compiler([*command, "-o", str(path)], "C++ compiler", "the tests compare with CUTLASS's host reference")

    build_once(target, compile_)
    return Host(ctypes.CDLL(str(target)))


def random_operand(kind: str, rows: int, k: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, row-major scale bytes and float64 values of a random matrix whose rows differ in magnitude."""
    if kind == "nvf4":
        codes = torch.randint(0, 256, (rows, k // 2), generator=gen, dtype=torch.uint8)
        scales = (torch.rand(rows, k // 16, generator=gen) * 400 + 0.01).to(torch.float8_e4m3fn)
        values = e2m1_decode(unpack_nibbles(codes)).double() * scales.double().repeat_interleave(16, dim=1)
        return codes, scales.view(torch.uint8), values
    x = torch.randn(rows, k, generator=gen) * torch.exp2(torch.randint(-6, 7, (rows, 1), generator=gen).float())
    codes, scales, _ = quantize(x, MX_SPEC[kind])
    return codes, scales, dequantize(codes, scales, MX_SPEC[kind]).double()


def pretend(monkeypatch: pytest.MonkeyPatch, arch: str = "sm_100a", multiprocessors: int = 148) -> list[Any]:
    """Let ``gemm`` take the CPU for a GPU on which kernels only note that they were opened and called.

    Returns:
        of each product: the configuration, (M, N, K, device, multiprocessors), and (problem, workspace, stream).
    """
    seen: list[Any] = []

    def run(problem: Any, workspace: int | None, stream: int) -> None:
        seen.append(SimpleNamespace(problem=problem, workspace=workspace, stream=stream))

    def prepared(configuration: Any, *asked: int) -> tuple[Any, int]:
        seen.extend((configuration, asked))
        return SimpleNamespace(run=run), 256

    monkeypatch.setattr(gemm, "_device", lambda device: (arch, multiprocessors))
    monkeypatch.setattr(gemm, "_prepared", prepared)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended GPU")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return seen


def fake_toolchain(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, nvcc: str = "13.0.88",
                   cutlass: tuple[int, int, int] = (4, 2, 0)) -> Path:
    """An nvcc that writes a few bytes, and headers that are a version number; the file that logs its compilations."""
    home, headers, log = folder / "cuda", folder / "cutlass", folder / "compilations"
    compiler = home / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    compiler.write_text(f"""#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {nvcc.rpartition('.')[0]}, V{nvcc}"; exit 0; fi
while [ $# -gt 0 ]; do case "$1" in -o) out="$2";; *.cu) source="$1";; esac; shift; done
echo "begin $source" >> {log}
sleep {seconds}
if grep -q fp16 "$source"; then echo "gemm.cu(7): error: no such kernel" >&2; exit 2; fi
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" >&2
echo "ptxas info    : Used 168 registers, used 7 barriers" >&2
cat "$source" > "$out"
echo "end $source" >> {log}
""")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    version = headers / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True, exist_ok=True)
    version.write_text("".join(f"#define CUTLASS_{part} {number}\n"
                               for part, number in zip(("MAJOR", "MINOR", "PATCH"), cutlass, strict=True)))
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CUTLASS_PATH", str(headers))
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return log


def compiled(log: Path) -> int:
    """How many compilations the fake nvcc began."""
    return sum(line.startswith("begin") for line in log.read_text().splitlines())
