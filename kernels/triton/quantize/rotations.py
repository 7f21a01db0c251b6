"""Python face of the Triton kernels that rotate and do not quantise, bit-equal to ``quartet.kernels.reference``.

They take and return tensors of one GPU; nothing waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.hadamard import SIZES
from quartet.kernels.spec import dtype_name
from quartet.kernels.triton.host import DTYPES, WARP, cdiv, check_given, on_device, power_of_two, warps, wide
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.quantize import rows

PROGRAMS = 4096  # that a reduction of a tensor to one number is shared among


def mask_rotate(x: Tensor, mask: Tensor | None, *, rotation: int, signs: Tensor | None, gain: float, cols: int,
                dtype: torch.dtype) -> Tensor:
    """``hadamard(apply_mask(x · gain, mask), rotation, signs, inverse=True, dtype)[:, :cols]``.

    Args:
        x: ``[R, Kp]`` float32, bfloat16 or float16; Kp a multiple of max(32, rotation). mask: uint8 ``[R, Kp/8]``, or
            None. signs: float32 ``[rotation]`` applied after the transform, or None.
        gain: one fp32 multiplication before everything else. cols: at most Kp.
    Returns:
        ``[R, cols]`` of ``dtype``, rounded to nearest even.
    """
    n = max(32, rotation)
    r, width = x.shape if x.dim() == 2 else (0, 1)
    if (x.dim() != 2 or x.dtype not in DTYPES or dtype not in DTYPES or width % n or not 0 <= cols <= width
            or rotation not in (0, *SIZES)):
        raise ValueError(f"mask_rotate needs a 2-D tensor of a width divisible by {n} and cols from 0 to it, got "
                         f"{dtype_name(x.dtype)} {list(x.shape)} on {x.device}, cols={cols}, "
                         f"dtype={dtype_name(dtype)}, rotation={rotation}")
    check_given("signs", signs, rotation, torch.float32, x)
    if mask is not None and (mask.shape != (r, width // 8) or mask.dtype != torch.uint8 or not mask.is_contiguous()
                             or mask.device != x.device):
        raise ValueError(f"the mask of x {list(x.shape)} must be contiguous uint8 [{r}, {width // 8}], got "
                         f"{dtype_name(mask.dtype)} {list(mask.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(r, cols, dtype=dtype)
    if out.numel():
        units = width // n
        lanes = min(128, power_of_two(units))
        with on_device(x):
            launch(rows.unrotate_rows, (r, cdiv(units, lanes)),
                (x, None if mask is None else mask.view(torch.int32), signs, out, r, cols, x.stride(0), units, gain),
                N=n, ROTATION=rotation, GAIN=gain != 1.0, WIDE=wide(x, n) and cols == width, B=lanes,
                num_warps=warps(lanes))
    return out


def rotated_amax(x: Tensor, rotation: int, signs: Tensor | None) -> Tensor:
    """``reference.largest_magnitude(hadamard(x, rotation, signs))`` in one read of ``x``: float32 ``[1, 1]``.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, any strides. rotation: Hadamard size.
        signs: float32 ``[rotation]`` before the transform, or None.
    """
    return _rotate(x, rotation, signs, False)[1]


def rotate(x: Tensor, rotation: int, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """``reference.hadamard(x, rotation, signs)`` and its largest magnitude; arguments as :func:`rotated_amax`.

    Returns:
        float32 ``[R, K rounded up to a multiple of rotation]``, and float32 ``[1, 1]``.
    """
    return _rotate(x, rotation, signs, True)


def _rotate(x: Tensor, rotation: int, signs: Tensor | None, store: bool) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or x.dtype not in DTYPES or rotation not in SIZES:
        raise ValueError(f"rotated values are of a 2-D tensor of float32, bfloat16 or float16 and a Hadamard of "
                         f"{', '.join(map(str, SIZES))}, got {dtype_name(x.dtype)} {list(x.shape)} and {rotation}")
    check_given("signs", signs, rotation, torch.float32, x)
    r, k = x.shape
    padded = cdiv(k, rotation) * rotation
    largest = x.new_zeros(1, 1, dtype=torch.int32)
    out = x.new_empty((r, padded) if store else 0, dtype=torch.float32)
    if x.numel():
        n = max(32, rotation) if padded % 32 == 0 else rotation
        units, along = padded // n, x.stride(1) == 1
        lanes = min(power_of_two(units), WARP) if along else 1
        per_program, across = WARP // lanes, cdiv(units, lanes)
        programs = max(1, min(cdiv(r, per_program), PROGRAMS // across))
        with on_device(x):
            launch(rows.rotate_rows, (programs, across),
                   (x, signs, largest, out, r, k, x.stride(0), x.stride(1), units), N=n, ROTATION=rotation,
                   STORE=store, WIDE=along and wide(x, n), R=per_program, L=lanes, num_warps=1)
    return out, largest.view(torch.float32)
