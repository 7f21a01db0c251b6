"""Graph ops over the fused CPU kernels, one for each chain of the IR.

    cpu_quantize      hadamard → quantize, optionally with the dequantised operand of the matmul; with ``parameter``,
                      what x was made from, the packed results serve all forwards of an optimizer step; ``fixed`` is
                      then what ``signs`` hold
    cpu_requantize    dequantize → transpose → hadamard → quantize, from packed codes
    cpu_dequantize    codes and scales → operand of the matmul
    cpu_unrotate      × gain → apply_mask → inverse hadamard → first columns
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.cpu import ops as cpu
from quartet.kernels.reference.philox import random_signs_of_int
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import ceil_to, code_layout, library
from quartet.runtime.slots.weights import REUSED, described

_CHAIN = "int rotation, Tensor? signs, str spec, Tensor? seed, int site, bool packed, ScalarType? values"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
library.define(f"cpu_quantize(Tensor x, {_CHAIN}, Tensor? parameter=None, int[]? fixed=None) -> {_FOUR}")
library.define(f"cpu_requantize(Tensor codes, Tensor scales, str in_spec, {_CHAIN}) -> {_FOUR}")
library.define("cpu_dequantize(Tensor codes, Tensor scales, str spec, ScalarType dtype) -> Tensor")
library.define("cpu_unrotate(Tensor x, Tensor? mask, int rotation, Tensor? signs, float gain, SymInt cols, "
               "ScalarType dtype) -> Tensor")

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _signs(seed: Tensor, site: int, n: int) -> Tensor:
    return random_signs_of_int(int(seed), site, n)


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


def _requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                seed: Tensor | None, site: int, packed: bool, values: torch.dtype | None) -> Four:
    return cpu.requantize(codes, scales, QuantSpec.parse(in_spec), transpose=True, rotation=rotation, signs=signs,
                          spec=QuantSpec.parse(spec), seed=seed, site=site, packed=packed, values=values)


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


def _quantize_fake(x, rotation, signs, spec, seed, site, packed, values, parameter=None, fixed=None):
    return _outputs(x, x.shape[0], x.shape[1], rotation, spec, packed, values)


def _requantize_fake(codes, scales, in_spec, rotation, signs, spec, seed, site, packed, values):
    return _outputs(codes, codes.shape[1] * 2, codes.shape[0], rotation, spec, packed, values)


def _dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    return cpu.dequantize(codes, scales, QuantSpec.parse(spec), dtype, gain=False)


def _dequantize_fake(codes, scales, spec, dtype):
    return codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)


def _unrotate(x: Tensor, mask: Tensor | None, rotation: int, signs: Tensor | None, gain: float, cols: int,
              dtype: torch.dtype) -> Tensor:
    return cpu.mask_rotate(x, mask, rotation=rotation, signs=signs, gain=gain, cols=cols, dtype=dtype)


def _unrotate_fake(x, mask, rotation, signs, gain, cols, dtype):
    return x.new_empty(x.shape[0], cols, dtype=dtype)


for _name, _impl, _fake in (
    ("cpu_quantize", _quantize, _quantize_fake),
    ("cpu_requantize", _requantize, _requantize_fake),
    ("cpu_dequantize", _dequantize, _dequantize_fake),
    ("cpu_unrotate", _unrotate, _unrotate_fake),
):
    library.impl(_name, _impl, "CPU")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=library)

library.impl("signs", _signs, "CPU")  # 130 one-element tensor ops otherwise

QUANTIZE = torch.ops.quartet.cpu_quantize.default
REQUANTIZE = torch.ops.quartet.cpu_requantize.default
DEQUANTIZE = torch.ops.quartet.cpu_dequantize.default
UNROTATE = torch.ops.quartet.cpu_unrotate.default
