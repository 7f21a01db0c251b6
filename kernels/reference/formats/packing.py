"""Nibbles, bit masks and the Blackwell scale layout."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """``[..., 2n]`` codes 0…15 → ``[..., n]`` uint8, element 2j in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_bits(mask: Tensor) -> Tensor:
    """``[..., 8n]`` bool → ``[..., n]`` uint8, least significant bit first."""
    bits = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 8, 8).to(torch.uint8)
    packed = bits[..., 0]
    for i in range(1, 8):
        packed = packed | (bits[..., i] << i)
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """``[..., n]`` uint8 → ``[..., 8n]`` bool."""
    bits = torch.stack([(packed >> i) & 1 for i in range(8)], dim=-1)
    return bits.flatten(-2).to(torch.bool)


def swizzled_size(rows: int, cols: int) -> int:
    """Bytes of ``[rows, cols]`` scales in the layout of :func:`swizzle_scales`, padding included."""
    return -(-rows // 128) * -(-cols // 4) * 512


def swizzled_offset(row: int, col: int, cols: int) -> int:
    """Where the scale ``[row, col]`` of ``cols`` columns lies in the layout of :func:`swizzle_scales`."""
    return (row // 128 * -(-cols // 4) + col // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4


def swizzle_scales(scales: Tensor) -> Tensor:
    """Row-major ``[rows, cols]`` scale bytes → the flat 128×4-tile layout of Blackwell's tensor cores.

    ``offset(r, c) = ((r//128)·ceil(C/4) + c//4)·512 + (r%32)·16 + ((r%128)//32)·4 + c%4``; rows are
    padded to 128 and columns to 4 with zero bytes.
    """
    rows, cols = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -cols % 4, 0, -rows % 128))
    tiles = padded.reshape(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle_scales(flat: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of :func:`swizzle_scales`; drops the padding."""
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    tiles = flat.reshape(row_tiles, col_tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(row_tiles * 128, col_tiles * 4)[:rows, :cols].contiguous()
