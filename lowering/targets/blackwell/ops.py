"""Graph ops over the Triton quantisers of MXFP4 and NVFP4 for Blackwell, and the product of MXFP4 in Triton.

    fp4_quantize       hadamard → quantize: packed codes, swizzled scales, mask
    fp4_quantize_both  the same of a tensor and of its transpose, from one read
    fp4_requantize     dequantize → transpose → hadamard → quantize, from packed codes and swizzled scales
    fp4_dot            gain · A · Bᵀ of packed codes under their scales, in Triton
    fp4_unswizzle      swizzled scales → [R, K/block], for what is not of this family

Codes are uint8 ``[R, K/2]``, K a multiple of the block. Scales are uint8 ``[swizzled_size(R, K/block)]`` in the layout
of ``quartet.kernels.reference.swizzle_scales``: what these ops make, only these ops and the products read.
Elsewhere the reference computes what has been lowered for such a GPU.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from quartet.kernels.reference import chains
from quartet.kernels.reference.formats.packing import swizzle_scales, unswizzle_scales
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import ceil_to
from quartet.lowering.ir.op import Size, op
from quartet.lowering.ir.ops.fused import chain_of, padded_to
from quartet.runtime.slots.weights import REUSED, described

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _kernels() -> ModuleType:
    """The Triton quantisers, imported where one runs: Triton need not be installed."""
    from quartet.kernels.triton.quantize import blackwell

    return blackwell


def _packed(like: Tensor, rows, cols, rotation: int, spec: str) -> Two:
    q = QuantSpec.parse(spec)
    padded = padded_to(cols, rotation, q)
    return (like.new_empty(rows, padded // 2, dtype=torch.uint8),
            like.new_empty(ceil_to(rows, 128) * ceil_to(padded // q.block, 4), dtype=torch.uint8))


def _swizzled(codes: Tensor, scales: Tensor, mask: Tensor, spec: QuantSpec) -> Three:
    scales = scales.view(torch.uint8)
    scales = scales.repeat_interleave(int(spec.block), 0)[: codes.shape[0]] if spec.tile else scales
    return codes, swizzle_scales(scales), mask if spec.mask else codes.new_empty(codes.shape[0], 0)


def _quantize_fake(x, rotation, signs, spec, seed, site, encode, parameter=None, fixed=None, hardware=True):
    codes, scales = _packed(x, x.shape[0], x.shape[1], rotation, spec)
    mask = x.new_empty(x.shape[0], codes.shape[1] // 4 if QuantSpec.parse(spec).mask else 0, dtype=torch.uint8)
    return codes, scales, mask


@op(fake=_quantize_fake)
def fp4_quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                 encode: Tensor | None, parameter: Tensor | None = None, fixed: list[int] | None = None,
                 hardware: bool = True) -> Three:
    q = QuantSpec.parse(spec)
    return _swizzled(*chains.rotate_quantize(x, rotation, signs, q, seed, site, encode), q)


@fp4_quantize.provider("triton", "cuda", replayed=True, owner="parameter")
def _quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
              encode: Tensor | None, parameter: Tensor | None = None, fixed: list[int] | None = None,
              hardware: bool = True) -> Three:
    def make(packed: bool) -> Three:
        return torch.ops.quartet.fp4_quantize.triton(x, rotation, signs, spec, seed, site, encode, hardware=hardware)

    def finish(codes: Tensor, scales: Tensor, mask: Tensor) -> Three:
        return codes, scales, mask

    if parameter is None:
        return _kernels().quantize(x, chain_of(rotation, signs, spec, seed, site, encode), hardware=hardware)
    return REUSED.serve(parameter, described(x, rotation, fixed, spec, "swizzled", hardware), True, make, finish)


def _quantize_both_fake(x, rotation, signs, spec, seed, site, encode, t_rotation, t_signs, t_spec, t_seed, t_site,
                        t_encode, hardware=True):
    rows, cols = x.shape
    return *_packed(x, rows, cols, rotation, spec), *_packed(x, cols, rows, t_rotation, t_spec)


@op(fake=_quantize_both_fake)
def fp4_quantize_both(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                      encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str,
                      t_seed: Tensor | None, t_site: int, t_encode: Tensor | None, hardware: bool = True) -> Four:
    return (*fp4_quantize.reference(x, rotation, signs, spec, seed, site, encode)[:2],
            *fp4_quantize.reference(x.t(), t_rotation, t_signs, t_spec, t_seed, t_site, t_encode)[:2])


@fp4_quantize_both.provider("triton", "cuda", replayed=True)
def _quantize_both(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                   encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str, t_seed: Tensor | None,
                   t_site: int, t_encode: Tensor | None, hardware: bool = True) -> Four:
    rows = chain_of(rotation, signs, spec, seed, site, encode)
    columns = chain_of(t_rotation, t_signs, t_spec, t_seed, t_site, t_encode)
    return _kernels().quantize_both(x, rows, columns, hardware=hardware)


def _requantize_fake(codes, scales, in_spec, rotation, signs, spec, seed, site, encode, hardware=True):
    return _packed(codes, codes.shape[1] * 2, codes.shape[0], rotation, spec)


@op(fake=_requantize_fake)
def fp4_requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                   seed: Tensor | None, site: int, encode: Tensor | None, hardware: bool = True) -> Two:
    before, q = QuantSpec.parse(in_spec), QuantSpec.parse(spec)
    scales = unswizzle_scales(scales, codes.shape[0], codes.shape[1] * 2 // before.block)
    return _swizzled(*chains.requantize(codes, scales, before, rotation, signs, q, seed, site), q)[:2]


@fp4_requantize.provider("triton", "cuda", replayed=True)
def _requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                seed: Tensor | None, site: int, encode: Tensor | None, hardware: bool = True) -> Two:
    chain = chain_of(rotation, signs, spec, seed, site, encode)
    return _kernels().requantize(codes, scales, QuantSpec.parse(in_spec), chain, hardware=hardware)


def _dot_fake(a, a_scales, b, b_scales, gain, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@op(fake=_dot_fake)
def fp4_dot(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, gain: float, dtype: torch.dtype) -> Tensor:
    left, right = (chains.unscaled(codes, unswizzle_scales(scales, *_blocks(codes)), QuantSpec())
                   for codes, scales in ((a, a_scales), (b, b_scales)))
    return (left @ right.t() * gain).to(dtype)


def _blocks(codes: Tensor) -> tuple[int, int]:
    """Rows and blocks of 32 of packed codes."""
    return codes.shape[0], codes.shape[1] // 16


@fp4_dot.provider("triton", "cuda", replayed=True)
def _dot(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, gain: float, dtype: torch.dtype) -> Tensor:
    from quartet.kernels.triton.gemm.scaled_gemm import gemm

    return gemm(a, a_scales, b, b_scales, gain, dtype)


@op(fake=lambda scales, rows, cols: scales.new_empty(rows, cols))
def fp4_unswizzle(scales: Tensor, rows: Size, cols: Size) -> Tensor:
    return unswizzle_scales(scales, rows, cols)


QUANTIZE, QUANTIZE_BOTH, REQUANTIZE = fp4_quantize.overload, fp4_quantize_both.overload, fp4_requantize.overload
DOT, UNSWIZZLE = fp4_dot.overload, fp4_unswizzle.overload
QUANTIZERS = (QUANTIZE, QUANTIZE_BOTH, REQUANTIZE)
