"""Fixtures of the kernel tests: seeded generators and the golden vectors, where they are present."""

from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import differences

GOLDEN = Path(__file__).parents[2] / "../shared/golden"


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(20240514)


@pytest.fixture(scope="module")
def interpreted(request) -> dict[str, list[str]]:
    """Case → how it differs from the reference in Triton's interpreter, of the module's ``SCRIPT``."""
    return differences(request.module.SCRIPT)


@pytest.fixture
def golden():
    """``golden("name")``: the arrays of one file as tensors; skips when the vectors are not beside the checkout."""

    def load(name: str) -> dict[str, torch.Tensor]:
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"golden vectors {name}.npz are not beside this checkout")
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture
def sylvester():
    """``sylvester(n)``: ±1 of the Hadamard matrix from the parity of ``i & j``, float64, unnormalised."""

    def matrix(n: int) -> torch.Tensor:
        return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)

    return matrix


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A kernel cache of the test's own, empty, and the compiler that the machine has by default."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder
