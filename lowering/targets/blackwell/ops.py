"""Graph ops over the Triton quantisers of MXFP4 and NVFP4 for Blackwell, and the product of MXFP4 in Triton.

    fp4_quantize       hadamard → quantize: packed codes, swizzled scales, mask
    fp4_quantize_both  the same of a tensor and of its transpose, from one read
    fp4_requantize     dequantize → transpose → hadamard → quantize, from packed codes and swizzled scales
    fp4_dot            gain · A · Bᵀ of packed codes under their scales, in Triton
    fp4_unswizzle      swizzled scales → [R, K/block], for what is not of this family

Codes are uint8 ``[R, K/2]``, K a multiple of the block. Scales are uint8 ``[swizzled_size(R, K/block)]`` in the layout
of ``quartet.kernels.reference.swizzle_scales``: what these ops make, only these ops and the products read. On a CPU the
reference computes what has been lowered for such a GPU.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference.formats.nvfp4 import quantize_encoded
from quartet.kernels.reference.formats.packing import swizzle_scales, unswizzle_scales
from quartet.kernels.reference.philox import random_bits
from quartet.kernels.reference.quantize import random_shape
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import ceil_to, library
from quartet.lowering.ir.fused import CHAIN, OTHER, chain_of, padded_to
from quartet.runtime.slots.weights import REUSED, described

_HOW = "bool hardware=True"
library.define(f"fp4_quantize(Tensor x, {CHAIN}, Tensor? parameter=None, int[]? fixed=None, {_HOW}) "
               "-> (Tensor, Tensor, Tensor)")
library.define(f"fp4_quantize_both(Tensor x, {CHAIN}, {OTHER}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(f"fp4_requantize(Tensor codes, Tensor scales, str in_spec, {CHAIN}, {_HOW}) "
               "-> (Tensor, Tensor)")
library.define("fp4_dot(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, float gain, ScalarType dtype) -> Tensor")
library.define("fp4_unswizzle(Tensor scales, SymInt rows, SymInt cols) -> Tensor")

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _kernels() -> ModuleType:
    """The Triton quantisers, imported where one runs: Triton need not be installed."""
    from quartet.kernels.triton.quantize import blackwell

    return blackwell


def _quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
              encode: Tensor | None, parameter: Tensor | None = None, fixed: list[int] | None = None,
              hardware: bool = True) -> Three:
    def make(packed: bool) -> Three:
        return _kernels().quantize(x, chain_of(rotation, signs, spec, seed, site, encode), hardware=hardware)

    def finish(codes: Tensor, scales: Tensor, mask: Tensor) -> Three:
        return codes, scales, mask

    if parameter is None:
        return make(True)
    return REUSED.serve(parameter, described(x, rotation, fixed, spec, "swizzled", hardware), True, make, finish)


def _quantize_cpu(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                  encode: Tensor | None, parameter: Tensor | None = None, fixed: list[int] | None = None,
                  hardware: bool = True) -> Three:
    q = QuantSpec.parse(spec)
    values = reference.hadamard(x, rotation, signs) if rotation else x.to(torch.float32)
    if encode is None:
        codes, scales, mask = reference.quantize(values, q, seed, site)
        return codes, swizzle_scales(scales), mask if q.mask else mask.new_empty(x.shape[0], 0)
    values = reference.pad_last(values, q.multiple)
    random = None if seed is None or not q.stochastic else random_bits(seed, site, *random_shape(q, *values.shape))
    codes, scales = quantize_encoded(values, q, encode, random, lambda kept: kept)
    scales = scales.view(torch.uint8)
    scales = scales.repeat_interleave(int(q.block), 0)[: x.shape[0]] if q.tile else scales
    return codes.contiguous(), swizzle_scales(scales), codes.new_empty(x.shape[0], 0)


def _quantize_both(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                   encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str, t_seed: Tensor | None,
                   t_site: int, t_encode: Tensor | None, hardware: bool = True) -> Four:
    rows = chain_of(rotation, signs, spec, seed, site, encode)
    columns = chain_of(t_rotation, t_signs, t_spec, t_seed, t_site, t_encode)
    return _kernels().quantize_both(x, rows, columns, hardware=hardware)


def _quantize_both_cpu(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                       encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str,
                       t_seed: Tensor | None, t_site: int, t_encode: Tensor | None, hardware: bool = True) -> Four:
    return (*_quantize_cpu(x, rotation, signs, spec, seed, site, encode)[:2],
            *_quantize_cpu(x.t(), t_rotation, t_signs, t_spec, t_seed, t_site, t_encode)[:2])


def _requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                seed: Tensor | None, site: int, encode: Tensor | None, hardware: bool = True) -> Two:
    chain = chain_of(rotation, signs, spec, seed, site, encode)
    return _kernels().requantize(codes, scales, QuantSpec.parse(in_spec), chain, hardware=hardware)


def _dot(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, gain: float, dtype: torch.dtype) -> Tensor:
    from quartet.kernels.triton.gemm.scaled_gemm import gemm

    return gemm(a, a_scales, b, b_scales, gain, dtype)


def _unswizzle(scales: Tensor, rows: int, cols: int) -> Tensor:
    return unswizzle_scales(scales, rows, cols)


def _packed(like: Tensor, rows, cols, rotation: int, spec: str) -> Two:
    q = QuantSpec.parse(spec)
    padded = padded_to(cols, rotation, q)
    return (like.new_empty(rows, padded // 2, dtype=torch.uint8),
            like.new_empty(ceil_to(rows, 128) * ceil_to(padded // q.block, 4), dtype=torch.uint8))


def _quantize_fake(x, rotation, signs, spec, seed, site, encode, parameter=None, fixed=None, hardware=True):
    codes, scales = _packed(x, x.shape[0], x.shape[1], rotation, spec)
    mask = x.new_empty(x.shape[0], codes.shape[1] // 4 if QuantSpec.parse(spec).mask else 0, dtype=torch.uint8)
    return codes, scales, mask


def _quantize_both_fake(x, rotation, signs, spec, seed, site, encode, t_rotation, t_signs, t_spec, t_seed, t_site,
                        t_encode, hardware=True):
    rows, cols = x.shape
    return *_packed(x, rows, cols, rotation, spec), *_packed(x, cols, rows, t_rotation, t_spec)


def _requantize_fake(codes, scales, in_spec, rotation, signs, spec, seed, site, encode, hardware=True):
    return _packed(codes, codes.shape[1] * 2, codes.shape[0], rotation, spec)


def _unswizzle_fake(scales, rows, cols):
    return scales.new_empty(rows, cols)


def _dot_fake(a, a_scales, b, b_scales, gain, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


for _name, _impl, _cpu, _fake in (
    ("fp4_quantize", _quantize, _quantize_cpu, _quantize_fake),
    ("fp4_quantize_both", _quantize_both, _quantize_both_cpu, _quantize_both_fake),
    ("fp4_requantize", _requantize, None, _requantize_fake),
    ("fp4_dot", _dot, None, _dot_fake),
    ("fp4_unswizzle", _unswizzle, _unswizzle, _unswizzle_fake),
):
    library.impl(_name, _impl, "CUDA")
    if _cpu is not None:
        library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=library)

QUANTIZE = torch.ops.quartet.fp4_quantize.default
QUANTIZE_BOTH = torch.ops.quartet.fp4_quantize_both.default
REQUANTIZE = torch.ops.quartet.fp4_requantize.default
DOT = torch.ops.quartet.fp4_dot.default
UNSWIZZLE = torch.ops.quartet.fp4_unswizzle.default
QUANTIZERS = (QUANTIZE, QUANTIZE_BOTH, REQUANTIZE)
