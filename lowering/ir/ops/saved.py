"""The semantic ops of saved activations, pure functions of their arguments like the rest of the IR.

    encode_saved(x, element, group, seed, site)            […, cols] → codes, scales
    decode_saved(codes, scales, element, group, dtype)     → […, cols]

On every device Inductor inlines the reference, so that encoding fuses with what computes the tensor and decoding with
what reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.formats import saved
from quartet.lowering import ir
from quartet.lowering.ir.op import op


def _encode_fake(x, element, group, seed, site):
    groups = (*x.shape[:-1], saved.groups_of(x.shape[-1], group))
    if element == "e4m3":
        return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(groups, dtype=torch.bfloat16)
    packed = (*x.shape[:-1], x.shape[-1] * saved.BITS[element] // 8)
    return x.new_empty(packed, dtype=torch.uint8), x.new_empty((*groups, 2), dtype=torch.float32)


def encode_inlined(x: Tensor, element: str, group: int, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """The reference with its random bits from an op of their own: Philox inlined would be computed 16 times over."""
    random = None
    if seed is not None and element != "e4m3":
        padded = ir.ceil_to(x.shape[-1], group)
        random = torch.ops.quartet.random_bits.default(seed, site, x.numel() // x.shape[-1], padded)
    return saved.encode_saved(x, element, group, seed, site, random)


@op(fake=_encode_fake, decompose=encode_inlined, strides="any")
def encode_saved(x: Tensor, element: str, group: int, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    return saved.encode_saved(x, element, group, seed, site)


def _decode_fake(codes, scales, element, group, dtype):
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // saved.BITS[element]), dtype=dtype)


@op(fake=_decode_fake, decompose=saved.decode_saved, strides="any")
def decode_saved(codes: Tensor, scales: Tensor, element: str, group: int, dtype: torch.dtype) -> Tensor:
    return saved.decode_saved(codes, scales, element, group, dtype).contiguous()


ENCODE, DECODE = encode_saved.overload, decode_saved.overload
