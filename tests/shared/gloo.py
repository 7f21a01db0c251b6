"""Functions of a module, each run by several gloo processes at once."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

available = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()),
                               reason="this PyTorch is built without gloo")


def run(file: str | Path, name: str, folder: Path, ranks: int = 2) -> list[Any]:
    """What ``name(rank, folder)`` of a Python file returns, one entry a rank; a failure on a rank raises here."""
    mp.spawn(_rank, (str(file), name, str(folder), ranks), nprocs=ranks)
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, file: str, name: str, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path.insert(0, str(Path(file).parent))
    function = getattr(importlib.import_module(Path(file).stem), name)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{name}", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, folder), f"{folder}/{name}{rank}.pt")
    finally:
        dist.destroy_process_group()
    leave()


def leave() -> None:
    """End this process, which has done what it should, without the end of its interpreter.

    A thread of gloo aborts an interpreter that ends while the thread still holds a tensor of Python's. That is so on a
    busy machine, and after DistributedDataParallel and FSDP2 the threads outlive ``destroy_process_group``:
    https://github.com/pytorch/pytorch/issues/190489
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
