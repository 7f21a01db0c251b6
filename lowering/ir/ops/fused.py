"""Graph ops over fused kernels, one for each chain of the IR; ``cuda_…`` are those that a GPU's kernels take alone.

    cuda_quantize       hadamard → quantize: packed results, and the FP8 operand of the matmul; with ``parameter``,
                        what x was made from, the packed results serve all forwards of an optimizer step; ``fixed`` is
                        then what ``signs`` hold
    cuda_quantize_both  the same of a tensor and of its transpose, from one read: two FP8 operands
    cuda_quantize_bytes  quantize to codes of a byte: FP8 in blocks and tiles, FP8 and INT8 rows
    cuda_quantize_bytes_both  the same of a tensor and of its transpose, in blocks and tiles, from one read
    cuda_requantize     dequantize → transpose → hadamard → quantize, from packed codes: an FP8 operand; of ``matrices``
                        below each other each is transposed
    cuda_fold           codes and scales → FP8 operand; with ``ends``, of groups along K
    cuda_rotated_amax   hadamard → amax
    cuda_rotate         hadamard, and its amax
    dequantize_operand  codes and scales → operand in another dtype, without the gain
    unrotate            × gain → apply_mask → inverse hadamard → first columns

An FP8 operand is float8_e4m3fn ``[R, K]`` with fp32 power-of-two scales ``[R, 1]``, or of groups ``[R, E]``.
``encode`` is the multiplier of the tensor, for E4M3 scales.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference import chains
from quartet.kernels.reference.quantize import largest_magnitude
from quartet.kernels.spec import QuantSpec, chain_multiple
from quartet.lowering.ir import ceil_to
from quartet.lowering.ir.op import Size, op
from quartet.lowering.ir.ops import core
from quartet.runtime.devices import Target, without_triton
from quartet.runtime.slots.weights import REUSED, described

if TYPE_CHECKING:
    from quartet.kernels.triton.quantize.ops import Chain

Two = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _kernels() -> ModuleType:
    """The Triton kernels, imported where one runs: Triton need not be installed."""
    from quartet.kernels.triton.quantize import ops

    return ops


def _cuda_kernels() -> ModuleType:
    """The CUDA C++ quantisers."""
    from quartet.kernels.cuda import ops

    return ops


def hopper(target: Target, at_once: bool = False) -> str | None:
    """None where the CUDA C++ quantisers run, or would with a compiler for a target that is only named; ``at_once``: as
    far as it is told without compiling them."""
    from quartet.kernels.cuda import build

    if target.foreign is not None or target.capability != (9, 0):
        return f"the CUDA quantisers were measured on compute capability 9.0, not on {target}"
    return None if target.pretended else build.foreseen() if at_once else build.unavailable()


_foreseen = partial(hopper, at_once=True)


def prepare(target: Target, specs: Collection[QuantSpec | None]) -> None:
    """Begin to compile the CUDA quantisers where one of these is theirs, while the caller goes on."""
    from quartet.kernels.cuda import build
    from quartet.kernels.cuda.ops import STOCHASTIC

    if STOCHASTIC in specs and not target.pretended and _foreseen(target) is None:
        build.begin()


def _rotations() -> ModuleType:
    from quartet.kernels.triton.quantize import rotations

    return rotations


def _draws() -> ModuleType:
    from quartet.kernels.triton import draws

    return draws


def chain_of(rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
             encode: Tensor | None) -> Chain:
    """A chain's arguments of an op as what the kernels take."""
    return _kernels().Chain(QuantSpec.parse(spec), rotation, signs, seed, site, encode)


@core.signs.provider("triton", "cuda", replayed=True)  # 130 launches otherwise
def _signs_triton(seed: Tensor, site: int, n: int) -> Tensor:
    return _draws().random_signs(seed, site, n)


@core.sign_table.provider("triton", "cuda", replayed=True)
def _sign_table_triton(seed: Tensor, first: int, count: int, n: int) -> Tensor:
    return _draws().sign_table(seed, first, count, n)


@core.random_bits.provider("triton", "cuda", replayed=True)  # as many, of int64 tensors
def _random_bits_triton(seed: Tensor, site: int, rows: int, cols: int) -> Tensor:
    return _draws().random_bits(seed, site, rows, cols)


def padded_to(cols, rotation: int, spec: QuantSpec):
    """``cols`` with the padding of a chain."""
    return ceil_to(cols, chain_multiple(spec, rotation))


def _outputs(like: Tensor, rows, cols, rotation: int, spec: str, packed: bool, folded: bool,
             ends: Tensor | None = None) -> Five:
    q = QuantSpec.parse(spec)
    padded = padded_to(cols, rotation, q)
    operand = _operand(like, rows, padded, ends=ends) if folded else _operand(like)

    def empty(*shape) -> Tensor:
        return like.new_empty(shape or 0, dtype=torch.uint8)

    if not packed:
        return empty(), empty(), empty(), *operand
    scales = empty(ceil_to(rows, 16) // 16 if q.tile else rows, padded // q.block)
    return (empty(rows, padded // 2), scales.view(torch.float8_e4m3fn) if q.scale == "e4m3" else scales,
            empty(rows, padded // 8) if q.mask else empty(), *operand)


def _operand(like: Tensor, *size, ends: Tensor | None = None) -> Two:
    """Of no elements without a size."""
    groups = 1 if ends is None else ends.shape[0]
    return (like.new_empty(size or 0, dtype=torch.float8_e4m3fn),
            like.new_empty((size[0], groups) if size else 0, dtype=torch.float32))


def _made(codes: Tensor, scales: Tensor, mask: Tensor, spec: str, packed: bool, folded: bool,
          ends: Tensor | None) -> Five:
    """What is asked for of a quantised tensor: packed results and the FP8 operand of a product."""
    none = codes.new_empty(0)
    operand = chains.fold(codes, scales, QuantSpec.parse(spec), ends) if folded else _operand(codes)
    return (codes, scales, mask, *operand) if packed else (none, none, none, *operand)


def _quantize_fake(x, rotation, signs, spec, seed, site, encode, packed, folded, parameter=None, fixed=None,
                   ends=None):
    return _outputs(x, x.shape[0], x.shape[1], rotation, spec, packed, folded, ends)


@op(fake=_quantize_fake)
def cuda_quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                  encode: Tensor | None, packed: bool, folded: bool, parameter: Tensor | None = None,
                  fixed: list[int] | None = None, ends: Tensor | None = None) -> Five:
    made = chains.rotate_quantize(x, rotation, signs, QuantSpec.parse(spec), seed, site, encode)
    return _made(*made, spec, packed, folded or ends is not None, ends)


@cuda_quantize.provider("triton", "cuda", replayed=True, owner="parameter")
def _quantize(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
              encode: Tensor | None, packed: bool, folded: bool, parameter: Tensor | None = None,
              fixed: list[int] | None = None, ends: Tensor | None = None) -> Five:
    def make(packed: bool) -> Five:
        return torch.ops.quartet.cuda_quantize.triton(x, rotation, signs, spec, seed, site, encode, packed, folded)

    def finish(codes: Tensor, scales: Tensor, mask: Tensor) -> Five:
        folds = torch.ops.quartet.cuda_fold.triton
        return codes, scales, mask, *(folds(codes, scales, spec) if folded else _operand(codes))

    if parameter is not None and ends is None:
        return REUSED.serve(parameter, described(x, rotation, fixed, spec), packed, make, finish)
    ops, chain = _kernels(), chain_of(rotation, signs, spec, seed, site, encode)
    if ends is None:
        return ops.quantize(x, chain, packed=packed, folded=folded)
    codes, scales, mask, *_ = ops.quantize(x, chain, packed=True, folded=False)
    kept = (codes, scales, mask) if packed else (t.new_empty(0) for t in (codes, scales, mask))
    return *kept, *ops.fold(codes, scales, chain.spec, ends)


def _quantize_both_fake(x, rotation, signs, spec, seed, site, encode, t_rotation, t_signs, t_spec, t_seed, t_site,
                        t_encode, t_ends=None):
    rows, cols = x.shape
    return (*_outputs(x, rows, cols, rotation, spec, False, True)[3:],
            *_outputs(x, cols, rows, t_rotation, t_spec, False, True, t_ends)[3:])


@op(fake=_quantize_both_fake)
def cuda_quantize_both(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                       encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str,
                       t_seed: Tensor | None, t_site: int, t_encode: Tensor | None,
                       t_ends: Tensor | None = None) -> Four:
    rows, columns = QuantSpec.parse(spec), QuantSpec.parse(t_spec)
    codes, scales, _ = chains.rotate_quantize(x, rotation, signs, rows, seed, site, encode)
    t_codes, t_scales, _ = chains.rotate_quantize(x.t(), t_rotation, t_signs, columns, t_seed, t_site, t_encode)
    return *chains.fold(codes, scales, rows), *chains.fold(t_codes, t_scales, columns, t_ends)


@cuda_quantize_both.provider("triton", "cuda", replayed=True)
def _quantize_both(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                   encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str, t_seed: Tensor | None,
                   t_site: int, t_encode: Tensor | None, t_ends: Tensor | None = None) -> Four:
    ops, rows = _kernels(), chain_of(rotation, signs, spec, seed, site, encode)
    columns = chain_of(t_rotation, t_signs, t_spec, t_seed, t_site, t_encode)
    codes, scales, t_codes, t_scales = ops.quantize_both(x, rows, columns)
    return *ops.fold(codes, scales, rows.spec), *ops.fold(t_codes, t_scales, columns.spec, t_ends)


@cuda_quantize_both.provider("cuda", "cuda", hopper, before="triton", replayed=True, exact=False, foresees=_foreseen)
def _quantize_both_cuda(x: Tensor, rotation: int, signs: Tensor | None, spec: str, seed: Tensor | None, site: int,
                        encode: Tensor | None, t_rotation: int, t_signs: Tensor | None, t_spec: str,
                        t_seed: Tensor | None, t_site: int, t_encode: Tensor | None,
                        t_ends: Tensor | None = None) -> Four:
    """Triton's where the CUDA kernels decline the tensor or a chain; the fold of the columns is Triton's."""
    ops, rows = _cuda_kernels(), chain_of(rotation, signs, spec, seed, site, encode)
    columns = chain_of(t_rotation, t_signs, t_spec, t_seed, t_site, t_encode)
    if ops.declines_both(x, rows, columns) is not None:
        return _quantize_both(x, rotation, signs, spec, seed, site, encode, t_rotation, t_signs, t_spec, t_seed, t_site,
                              t_encode, t_ends)
    portable = _kernels()
    *folded, codes, scales = ops.quantize_both(x, rows, columns, portable.inexact_blocks(x.device))
    return *folded, *portable.fold(codes, scales, columns.spec, t_ends)


def _bytes_fake(x, spec):
    return core.quantize.fake(x, spec, None, 0)[:2]


@op(fake=_bytes_fake)
def cuda_quantize_bytes(x: Tensor, spec: str) -> Two:
    codes, scales, _ = core.quantize.reference(x, spec, None, 0)
    return codes, scales


@cuda_quantize_bytes.provider("triton", "cuda", without_triton, replayed=True)
def _quantize_bytes(x: Tensor, spec: str) -> Two:
    from quartet.kernels.triton.bytes import rows, tiles

    q = QuantSpec.parse(spec)
    return (tiles if q.blocked else rows).quantize(x, q)


@op(fake=lambda x, spec, t_spec: (*_bytes_fake(x, spec), *_bytes_fake(x.t(), t_spec)))
def cuda_quantize_bytes_both(x: Tensor, spec: str, t_spec: str) -> Four:
    return *cuda_quantize_bytes.reference(x, spec), *cuda_quantize_bytes.reference(x.t(), t_spec)


@cuda_quantize_bytes_both.provider("triton", "cuda", without_triton, replayed=True)
def _quantize_bytes_both(x: Tensor, spec: str, t_spec: str) -> Four:
    from quartet.kernels.triton.bytes import tiles

    return tiles.quantize_both(x, QuantSpec.parse(spec), QuantSpec.parse(t_spec))


def _requantize_fake(codes, scales, in_spec, rotation, signs, spec, seed, site, encode, packed, folded, matrices=1,
                     ends=None):
    made = _outputs(codes, matrices * codes.shape[1] * 2, codes.shape[0] // matrices, rotation, spec, packed, folded,
                    ends)
    return *made[:2], made[2].new_empty(0), *made[3:]


@op(fake=_requantize_fake)
def cuda_requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                    seed: Tensor | None, site: int, encode: Tensor | None, packed: bool, folded: bool,
                    matrices: Size = 1, ends: Tensor | None = None) -> Five:
    made, scales, _ = chains.requantize(codes, scales, QuantSpec.parse(in_spec), rotation, signs,
                                        QuantSpec.parse(spec), seed, site, matrices)
    return _made(made, scales, codes.new_empty(0), spec, packed, folded, ends)


@cuda_requantize.provider("triton", "cuda", replayed=True)
def _requantize(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                seed: Tensor | None, site: int, encode: Tensor | None, packed: bool, folded: bool,
                matrices: int = 1, ends: Tensor | None = None) -> Five:
    chain = chain_of(rotation, signs, spec, seed, site, encode)
    codes, scales = _kernels().requantize(codes, scales, QuantSpec.parse(in_spec), chain, matrices=matrices)
    return _requantized(codes, scales, chain.spec, packed, folded, ends)


def _requantized(codes: Tensor, scales: Tensor, spec: QuantSpec, packed: bool, folded: bool,
                 ends: Tensor | None) -> Five:
    operand = _kernels().fold(codes, scales, spec, ends) if folded else _operand(codes)
    codes, scales = (codes, scales) if packed else (codes.new_empty(0), codes.new_empty(0))
    return codes, scales, codes.new_empty(0), *operand


@cuda_requantize.provider("cuda", "cuda", hopper, before="triton", replayed=True, exact=False, foresees=_foreseen)
def _requantize_cuda(codes: Tensor, scales: Tensor, in_spec: str, rotation: int, signs: Tensor | None, spec: str,
                     seed: Tensor | None, site: int, encode: Tensor | None, packed: bool, folded: bool,
                     matrices: int = 1, ends: Tensor | None = None) -> Five:
    """Triton's where the CUDA kernel declines the tensor or the chain, and for codes alone (those of groups are
    folded afterwards), which it makes faster."""
    ops, chain = _cuda_kernels(), chain_of(rotation, signs, spec, seed, site, encode)
    if (not folded or ends is not None
            or ops.declines_requantize(codes, scales, QuantSpec.parse(in_spec), chain, matrices) is not None):
        return _requantize(codes, scales, in_spec, rotation, signs, spec, seed, site, encode, packed, folded, matrices,
                           ends)
    inexact, none = _kernels().inexact_blocks(codes.device), codes.new_empty(0)
    codes, scales, *operand = ops.requantize(codes, scales, chain, inexact, packed=packed, folded=True,
                                             matrices=matrices)
    return codes, scales, none, *operand


def _fold_fake(codes, scales, spec, ends=None):
    return _operand(codes, codes.shape[0], codes.shape[1] * 2, ends=ends)


@op(fake=_fold_fake)
def cuda_fold(codes: Tensor, scales: Tensor, spec: str, ends: Tensor | None = None) -> Two:
    return chains.fold(codes, scales, QuantSpec.parse(spec), ends)


@cuda_fold.provider("triton", "cuda", replayed=True)
def _fold(codes: Tensor, scales: Tensor, spec: str, ends: Tensor | None = None) -> Two:
    return _kernels().fold(codes, scales, QuantSpec.parse(spec), ends)


def _dequantize_fake(codes, scales, spec, dtype):
    return codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)


@op(fake=_dequantize_fake)
def dequantize_operand(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    return chains.unscaled(codes, scales, QuantSpec.parse(spec), dtype)


@dequantize_operand.provider("triton", "cuda", replayed=True)
def _dequantize(codes: Tensor, scales: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    return _kernels().dequantize(codes, scales, QuantSpec.parse(spec), dtype)


def _unrotate_fake(x, mask, rotation, signs, gain, cols, dtype):
    return x.new_empty(x.shape[0], cols, dtype=dtype)


@op(fake=_unrotate_fake)
def unrotate(x: Tensor, mask: Tensor | None, rotation: int, signs: Tensor | None, gain: float, cols: Size,
             dtype: torch.dtype) -> Tensor:
    return chains.unrotate(x, mask, rotation, signs, gain, cols, dtype)


@unrotate.provider("triton", "cuda", replayed=True)
def _unrotate(x: Tensor, mask: Tensor | None, rotation: int, signs: Tensor | None, gain: float, cols: int,
              dtype: torch.dtype) -> Tensor:
    return _rotations().mask_rotate(x, mask, rotation=rotation, signs=signs, gain=gain, cols=cols, dtype=dtype)


@op(fake=lambda x, rotation, signs: x.new_empty(1, 1, dtype=torch.float32))
def cuda_rotated_amax(x: Tensor, rotation: int, signs: Tensor | None) -> Tensor:
    return largest_magnitude(reference.hadamard(x, rotation, signs))


@cuda_rotated_amax.provider("triton", "cuda", replayed=True)
def _rotated_amax(x: Tensor, rotation: int, signs: Tensor | None) -> Tensor:
    return _rotations().rotated_amax(x, rotation, signs)


def _rotate_fake(x, rotation, signs):
    return (x.new_empty(x.shape[0], ceil_to(x.shape[1], rotation), dtype=torch.float32),
            x.new_empty(1, 1, dtype=torch.float32))


@op(fake=_rotate_fake)
def cuda_rotate(x: Tensor, rotation: int, signs: Tensor | None) -> Two:
    rotated = reference.hadamard(x, rotation, signs)
    return rotated, largest_magnitude(rotated)


@cuda_rotate.provider("triton", "cuda", replayed=True)
def _rotate(x: Tensor, rotation: int, signs: Tensor | None) -> Two:
    return _rotations().rotate(x, rotation, signs)


QUANTIZE, QUANTIZE_BOTH, REQUANTIZE = cuda_quantize.overload, cuda_quantize_both.overload, cuda_requantize.overload
FOLD, DEQUANTIZE, UNROTATE = cuda_fold.overload, dequantize_operand.overload, unrotate.overload
ROTATED_AMAX, ROTATE = cuda_rotated_amax.overload, cuda_rotate.overload
QUANTIZE_BYTES, QUANTIZE_BYTES_BOTH = cuda_quantize_bytes.overload, cuda_quantize_bytes_both.overload
