"""A program as several processes on this machine, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

SHOWN = 4000  # characters of a failed program's errors: torchrun says last which rank ended how


def run(program: str | Path, *arguments: str | Path, ranks: int = 2, folder: Path | None = None) -> str:
    """What the ranks print; a rank that fails fails the test, with the end of what was written to stderr."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *(several if ranks > 1 else ()), str(program), *map(str, arguments)],
                          cwd=folder, text=True, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, f"status {done.returncode} of {Path(program).name}: {done.stderr[-SHOWN:]}"
    return done.stdout


def _rank(program: str, *arguments: str) -> None:
    import gloo

    sys.argv, sys.path[0] = [program, *arguments], str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")
    gloo.leave()


if __name__ == "__main__":
    _rank(*sys.argv[1:])
