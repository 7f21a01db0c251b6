"""What the Python faces of the Triton kernels share: types, sizes of launches, checks of given tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.spec import dtype_name
from quartet.kernels.triton.memory import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARP = 32


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own is made for its kernels and takes microseconds on the host.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def wide(x: Tensor, n: int) -> bool:
    """Whether units of n elements can be read 16 bytes at a time."""
    size = x.element_size()
    return x.shape[1] % n == 0 and x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0


def warps(lanes: int) -> int:
    return max(1, min(16, lanes // 32))


def hardware(device: torch.device, *sizes: int) -> bool:
    """Whether the GPU is to convert a tensor of these sizes to FP8 itself.

    Not with a size of 1, of which Triton makes a constant: four known zeros give two equal conversions then, and of two
    words ``{low, high}`` with the same ``high`` ptxas before CUDA 13.0 leaves the upper half of the first unwritten.
    """
    return 1 not in sizes and _converts_fp8(device)


@cache
def _converts_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and not INTERPRETED.value and torch.cuda.get_device_capability(device) >= (8, 9)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device as the current one; in Triton's interpreter that may be the CPU."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if INTERPRETED.value:
        return nullcontext()
    raise ValueError(f"the Triton kernels run on a GPU, and the tensor {list(x.shape)} is on {x.device}")


def check_given(what: str, value: Tensor | None, size: int, dtype: torch.dtype, x: Tensor) -> None:
    if value is not None and (value.device != x.device or value.numel() != size or value.dtype != dtype
                              or not value.is_contiguous() or value.data_ptr() % max(1, min(16, 4 * size))):
        raise ValueError(f"{what} must be {size} contiguous {dtype_name(dtype)} on {x.device}, got "
                         f"{dtype_name(value.dtype)} {list(value.shape)} on {value.device}")
