"""Operands for Blackwell's FP4 tensor cores: packed codes, and scales in the order in which those read them.

The kernels are those of :mod:`quartet.kernels.triton.quantize.ops`, which write the scales in that layout themselves,
and so are checks and errors. Blocks are of 32 with E8M0 scales, of 16 with E4M3. Where the GPU has instructions that
convert to E2M1 they can do the rounding: to nearest they give the codes of the reference, element 2j in the low nibble;
stochastically they round as fairly but spend the random bits in their own way, so the codes are those of that GPU
family only.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton.quantize import ops
from quartet.kernels.triton.quantize.chain import Chain, Form

BLOCKS = {"e8m0": 32, "e4m3": 16}
CONVERSIONS: dict[tuple[int, int], tuple[str, ...]] = {
    (10, 0): ("nearest", "stochastic"), (10, 3): ("nearest", "stochastic"), (12, 0): ("nearest",),
    (12, 1): ("nearest",)}


@cache
def conversions(device: torch.device) -> tuple[str, ...]:
    """The roundings that a device's instructions do."""
    return CONVERSIONS.get(torch.cuda.get_device_capability(device), ()) if device.type == "cuda" else ()


def quantize(x: Tensor, chain: Chain, *, hardware: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize(hadamard(x, …), …)`` along the last axis, in one read of ``x``.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, any strides.
        hardware: round by the GPU's conversions where it has them, else in integer arithmetic as everywhere.
    Returns:
        codes uint8 ``[R, Kp/2]``, scales uint8 ``[swizzled_size(R, Kp/block)]``, padding 0, those of tiles for each
        row, and mask uint8 ``[R, Kp/8]`` if ``spec.mask``, else ``[R, 0]``; Kp = K rounded up to a multiple of
        ``chain.multiple``.
    Raises:
        ValueError: blocks of another size, and as :func:`quartet.kernels.triton.quantize.ops.quantize`.
    """
    codes, scales, mask, _, _ = ops.quantize(x, chain, packed=True, folded=False, form=_form(x, hardware, chain.spec))
    return codes, scales, mask if chain.spec.mask else mask.new_empty(x.shape[0], 0)


def quantize_both(x: Tensor, along_rows: Chain, along_columns: Chain, *,
                  hardware: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of ``x`` quantised along its rows, and of ``x.t()`` along its: one read of ``x`` ``[R, K]``.

    Returns:
        codes uint8 ``[R, Kp/2]``, scales uint8 ``[swizzled_size(R, Kp/32)]``; codes uint8 ``[K, Rp/2]``, scales uint8
        ``[swizzled_size(K, Rp/32)]``. Argument and errors as :func:`quantize`.
    """
    form = _form(x, hardware, along_rows.spec, along_columns.spec)
    return ops.quantize_both(x, along_rows, along_columns, form)


def requantize(codes: Tensor, scales: Tensor, in_spec: QuantSpec, chain: Chain, *,
               hardware: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a quantised tensor's transpose: ``quantize(hadamard(v.t()))``, ``v = dequantize(codes)``.

    Args:
        codes, scales: uint8 ``[R, K/2]`` and ``[swizzled_size(R, K/32)]``, contiguous; ``in_spec`` has no gain.
    Returns:
        codes uint8 ``[K, Rp/2]`` and scales uint8 ``[swizzled_size(K, Rp/32)]``. Errors as :func:`quantize`.
    """
    return ops.requantize(codes, scales, in_spec, chain, _form(codes, hardware, in_spec, chain.spec))


def _form(x: Tensor, hardware: bool, *specs: QuantSpec) -> Form:
    for spec in specs:
        if spec.block != BLOCKS.get(spec.scale):
            raise ValueError(f"the FP4 tensor cores scale blocks of {BLOCKS.get(spec.scale)} by {spec.scale}, not of "
                             f"{spec.block}; change '{spec}', or use the quantisers of "
                             "quartet.kernels.triton.quantize.ops")
    return Form(True, conversions(x.device) if hardware else ())
