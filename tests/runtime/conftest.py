"""A launcher in C++ over a driver whose device is the host."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from quartet.kernels import launcher as launches
from quartet.runtime.replay import library
from quartet.runtime.replay.library import Launcher

STUB = Path(__file__).with_name("stub_driver.c")
_names = iter(f"test_replay_{i}" for i in range(1000))


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", path, STUB], check=True)
    return path


@pytest.fixture
def driver(stub, monkeypatch):
    monkeypatch.setattr(launches, "DRIVER", str(stub))
    return ctypes.CDLL(str(stub))


@pytest.fixture
def launcher(driver, stub):
    made = Launcher()
    made.load(library.library(), str(stub))
    yield made
    for called in list(made._offers):
        made.withdraw(called)
    torch.ops.quartet_replay.limit(1 << 14)


@pytest.fixture
def declare(launcher):
    """``declare(run, schema)`` is an op whose calls on a CPU C++ takes, and its counts."""
    fragment = torch.library.Library("quartet", "FRAGMENT")

    def declare(run, schema, **how):
        name = next(_names)
        fragment.define(name + schema)
        fragment.impl(name, launcher.offer(name, schema, run, "cpu", **how), "CompositeExplicitAutograd")
        return getattr(torch.ops.quartet, name).default, lambda: launcher.counts(name)

    declare.launcher = launcher
    return declare
