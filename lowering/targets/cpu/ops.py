"""Graph ops over the fused CPU kernels, one for each chain of the IR.

    cpu_quantize      hadamard → quantize, optionally with the dequantised operand of the matmul; with ``parameter``,
                      what x was made from, the packed results serve all forwards of an optimizer step; ``fixed`` is
                      then what ``signs`` hold
    cpu_requantize    dequantize → transpose → hadamard → quantize, from packed codes

and the providers for a CPU of the ops that kernels of GPUs share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.cpu import ops as cpu
from quartet.kernels.reference import chains
from quartet.kernels.reference.philox import random_signs_of_int
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import ceil_to, code_layout
from quartet.lowering.ir.op import op
from quartet.lowering.ir.ops import core, fused
from quartet.runtime.slots.weights import REUSED, described

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@core.signs.provider("scalar", "cpu")  # 130 one-element tensor ops otherwise
def _signs_of_int(seed: Tensor, site: int, n: int) -> Tensor:
    return random_signs_of_int(int(seed), site, n)


def _outputs(like: Tensor, rows, cols, rotation: int, spec: str, packed: bool, values: torch.dtype | None) -> Four:
    q = QuantSpec.parse(spec)
    padded = ceil_to(cols, max(rotation, q.block))
    dtype, width = code_layout(q, padded)
    empty = like.new_empty(0, dtype=torch.uint8)
    return (
        like.new_empty(rows, width, dtype=dtype) if packed else empty,
        like.new_empty(rows, padded // q.block, dtype=torch.uint8) if packed else like.new_empty(0, dtype=torch.uint8),
        like.new_empty(rows, padded // 8, dtype=torch.uint8) if packed and q.mask
        else like.new_empty(0, dtype=torch.uint8),
        like.new_empty(rows, padded, dtype=values) if values is not None else like.new_empty(0, dtype=torch.float32),
    )


def _made(codes: Tensor, scales: Tensor, mask: Tensor, spec: str, packed: bool, values: torch.dtype | None) -> Four:
    """What is asked for of a quantised tensor: packed results and the operand of the product."""
    q, none = QuantSpec.parse(spec), codes.new_empty(0)
    operand = none.to(torch.float32) if values is None else chains.unscaled(codes, scales, q, values)
    return (codes, scales, mask, operand) if packed else (none, none, none, operand)


def _quantize_fake(x, rotation, signs, spec, seed, site, packed, values, parameter=None, fixed=None):
    return _outputs(x, x.shape[0], x.shape[1], rotation, spec, packed, values)


@op(fake=_quantize_fake)
def cpu_quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                 packed: bool, values: torch.dtype | None, parameter: Tensor | None = None,
                 fixed: list[int] | None = None) -> Four:
    made = chains.rotate_quantize(x, rotation, signs, QuantSpec.parse(spec), seed, site)
    return _made(*made, spec, packed, values)


@cpu_quantize.provider("cpp", "cpu")
def _quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
              packed: bool, values: torch.dtype | None, parameter: Tensor | None = None,
              fixed: list[int] | None = None) -> Four:
    def make(packed: bool) -> Four:
        return cpu.rotate_quantize(x, rotation=rotation, signs=signs, spec=QuantSpec.parse(spec), seed=seed, site=site,
                                   packed=packed, values=values)

    def finish(codes: Tensor, scales: Tensor, mask: Tensor) -> Four:
        return codes, scales, mask, x.new_empty(0) if values is None else _dequantize(codes, scales, spec, values)

    if parameter is None:
        return make(packed)
    return REUSED.serve(parameter, described(x, rotation, fixed, spec), packed, make, finish)


def _requantize_fake(codes, scales, in_spec, rotation, signs, spec, seed, site, packed, values):
    return _outputs(codes, codes.shape[1] * 2, codes.shape[0], rotation, spec, packed, values)


@op(fake=_requantize_fake)
def cpu_requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                   seed: Tensor | None, site: int, packed: bool, values: torch.dtype | None) -> Four:
    q = QuantSpec.parse(in_spec)
    x = (chains.unscaled(codes, scales, q) * q.gain).t()
    return _made(*chains.rotate_quantize(x, rotation, signs, QuantSpec.parse(spec), seed, site), spec, packed, values)


@cpu_requantize.provider("cpp", "cpu")
def _requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                seed: Tensor | None, site: int, packed: bool, values: torch.dtype | None) -> Four:
    return cpu.requantize(codes, scales, QuantSpec.parse(in_spec), transpose=True, rotation=rotation, signs=signs,
                          spec=QuantSpec.parse(spec), seed=seed, site=site, packed=packed, values=values)


@fused.dequantize_operand.provider("cpp", "cpu")
def _dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    q = QuantSpec.parse(spec)
    if q.scale != "e8m0":  # of NVFP4, lowered for a GPU and run here
        return chains.unscaled(codes, scales, q, dtype)
    return cpu.dequantize(codes, scales, q, dtype, gain=False)


@fused.unrotate.provider("cpp", "cpu")
def _unrotate(x: Tensor, mask: Tensor | None, rotation: int, signs: Tensor | None, gain: float, cols: int,
              dtype: torch.dtype) -> Tensor:
    return cpu.mask_rotate(x, mask, rotation=rotation, signs=signs, gain=gain, cols=cols, dtype=dtype)


QUANTIZE, REQUANTIZE = cpu_quantize.overload, cpu_requantize.overload
