"""``without_code.py PROGRAM ARGUMENTS``: a program with the backend's graphs run as they are."""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))


def main(program, *arguments):
    from torchvision_here import complete
    from uncompiled import uncompiled

    complete()
    torch._dynamo.lookup_backend("quartet")
    torch._dynamo.backends.registry._COMPILER_FNS["quartet"] = uncompiled
    sys.path.insert(0, str(Path(program).parent))
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
