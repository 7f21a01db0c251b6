"""Where nvcc and the CUTLASS headers are, and for which architectures their versions are enough."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from quartet.kernels.build_cache import BuildError, run_compiler
from quartet.kernels.files import expanded

FALLBACK = 'options={"disable_kernels": ["cutlass"]} of torch.compile takes the next best kernels instead'
NVCC_REMEDY = ("install the CUDA toolkit 13.0 or newer (NVIDIA's Debian repository: apt-get install cuda-nvcc-13-0 "
               "cuda-cudart-dev-13-0) and put its bin folder on PATH, or set CUDA_HOME, or copy here the cache folder "
               f"of a machine where `quartet build` has run; {FALLBACK}")
HEADERS_REMEDY = f"run `pip install nvidia-cutlass`; {FALLBACK}"
OLDEST_CUTLASS = (4, 2)
OLDEST_NVCC = {"sm_100a": (12, 8), "sm_103a": (12, 9), "sm_120a": (12, 8), "sm_121a": (12, 9)}


@dataclass(frozen=True)
class Toolchain:
    """A compiler and headers that fit together.

    Attributes:
        nvcc: the compiler. nvcc_version: such as ``"13.0.88"``.
        include: the folder that holds ``cutlass/`` and ``cute/``. cutlass_version: such as ``"4.2.0"``.
    """

    nvcc: Path
    nvcc_version: str
    include: Path
    cutlass_version: str

    def check(self, arch: str) -> None:
        """Raise BuildError when this compiler does not know the architecture."""
        if _numbers(self.nvcc_version) < OLDEST_NVCC[arch]:
            raise BuildError(f"{self.nvcc} is version {self.nvcc_version}; {arch} needs {_dots(OLDEST_NVCC[arch])} or "
                             f"newer: {NVCC_REMEDY}")


def toolchain() -> Toolchain:
    """The toolchain of this machine. Raises BuildError when a part is missing or too old, with the remedy."""
    include = find_headers()
    nvcc = find_nvcc()
    return Toolchain(nvcc, nvcc_version(nvcc), include, cutlass_version(include))


def unavailable(arch: str) -> str | None:
    """None when kernels for ``arch`` can be compiled here, else why not and what to do."""
    try:
        toolchain().check(arch)
    except BuildError as error:
        return str(error)
    return None


def find_nvcc() -> Path:
    """nvcc of ``$CUDA_HOME``, ``$CUDA_PATH``, ``$PATH`` or /usr/local/cuda, in this order. Raises BuildError."""
    homes = [_home(name, said) for name in ("CUDA_HOME", "CUDA_PATH") if (said := os.environ.get(name))]
    on_path = shutil.which("nvcc")
    tried = [*(home / "bin" / "nvcc" for home in homes), *([Path(on_path)] if on_path else []),
             Path("/usr/local/cuda/bin/nvcc")]
    for path in tried:
        if os.access(path, os.X_OK) and path.is_file():
            return path
    raise BuildError(f"nvcc is missing: {NVCC_REMEDY}")


def _home(name: str, path: str) -> Path:
    """The folder that a variable of the environment names. Raises BuildError."""
    try:
        return expanded(path)
    except FileNotFoundError as error:
        raise BuildError(f"environment variable {name}: {error.strerror}") from error


def code_for(arch: str) -> tuple[str, str]:
    """Arguments of nvcc that generate code for an architecture, ``"sm_90"``, and nothing else."""
    return "-gencode", f"arch=compute_{arch.removeprefix('sm_')},code={arch}"


def nvcc_version(nvcc: Path) -> str:
    """``"13.0.88"``, as nvcc says. Raises BuildError when it does not run or says something else."""
    status = nvcc.stat()
    return _nvcc_version(nvcc, status.st_mtime_ns, status.st_size)


@cache
def _nvcc_version(nvcc: Path, modified: int, size: int) -> str:
    said = run_compiler([str(nvcc), "--version"], "CUDA compiler", NVCC_REMEDY)[0]
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if found is None:
        raise BuildError(f"`{nvcc} --version` names no version but {said.strip()[:200]!r}: {NVCC_REMEDY}")
    return found[1]


def find_headers() -> Path:
    """Include folder of ``$CUTLASS_PATH`` or of the package ``nvidia-cutlass``, in this order. Raises BuildError."""
    override = os.environ.get("CUTLASS_PATH")
    if override:
        include = _home("CUTLASS_PATH", override) / "include"
        if not (include / "cutlass" / "version.h").is_file():
            raise BuildError(f"CUTLASS_PATH={override} has no include/cutlass/version.h; point it at a checkout of "
                             "CUTLASS, or unset it to take the package nvidia-cutlass")
        return include
    spec = find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        include = Path(folder) / "source" / "include"
        if (include / "cutlass" / "version.h").is_file():
            return include
    raise BuildError(f"the CUTLASS headers are missing: {HEADERS_REMEDY}")


def cutlass_version(include: Path) -> str:
    """``"4.2.0"``, from ``cutlass/version.h``. Raises BuildError when that is older than ``OLDEST_CUTLASS``."""
    text = (include / "cutlass" / "version.h").read_text(encoding="utf-8", errors="replace")
    found = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = ".".join(match[1] for match in found if match)
    if _numbers(version) < OLDEST_CUTLASS:
        raise BuildError(f"the CUTLASS headers in {include} are version {version or 'unknown'}; "
                         f"{_dots(OLDEST_CUTLASS)} or newer are needed: {HEADERS_REMEDY}")
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
