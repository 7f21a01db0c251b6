"""The semantic ops of saved activations, pure functions of their arguments like the rest of the IR.

    encode_saved(x, element, group, seed, site)            […, cols] → codes, scales
    decode_saved(codes, scales, element, group, dtype)     → […, cols]

On every device Inductor inlines the reference, so that encoding fuses with what computes the tensor and decoding with
what reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.formats import saved
from quartet.lowering import ir

_ANY_STRIDES = (torch.Tag.flexible_layout,)

ir.library.define("encode_saved(Tensor x, str element, int group, Tensor? seed, int site) -> (Tensor, Tensor)",
                  tags=_ANY_STRIDES)
ir.library.define("decode_saved(Tensor codes, Tensor scales, str element, int group, ScalarType dtype) -> Tensor",
                  tags=_ANY_STRIDES)


def _encode(x: Tensor, element: str, group: int, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    return saved.encode_saved(x, element, group, seed, site)


def _encode_fake(x: Tensor, element: str, group: int, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    groups = (*x.shape[:-1], (x.shape[-1] + group - 1) // group)
    if element == "e4m3":
        return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(groups, dtype=torch.bfloat16)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((*groups, 2), dtype=torch.float32)


def _decode(codes: Tensor, scales: Tensor, element: str, group: int, dtype: torch.dtype) -> Tensor:
    return saved.decode_saved(codes, scales, element, group, dtype).contiguous()


def _decode_fake(codes: Tensor, scales: Tensor, element: str, group: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


for _name, _impl, _fake in (("encode_saved", _encode, _encode_fake), ("decode_saved", _decode, _decode_fake)):
    ir.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quartet::{_name}", _fake, lib=ir.library)

ENCODE = torch.ops.quartet.encode_saved.default
DECODE = torch.ops.quartet.decode_saved.default


def encode_inlined(x: Tensor, element: str, group: int, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """The reference with its random bits from an op of their own: Philox inlined would be computed 16 times over."""
    random = None
    if seed is not None:
        padded = ir.ceil_to(x.shape[-1], group)
        random = torch.ops.quartet.random_bits(seed, site, x.numel() // x.shape[-1], padded)
    return saved.encode_saved(x, element, group, seed, site, random)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {ENCODE: encode_inlined, DECODE: saved.decode_saved}
