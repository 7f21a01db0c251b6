"""Batches of matrices ``[batch, rows, cols]`` as the 2-D tensors ``[batch·rows, cols]`` that quantisers read, and back.

A site without a batch passes through: its operands are matrices already.
"""

from __future__ import annotations

from torch.fx import Node

from quartet.lowering.ir.graph import Builder, aten
from quartet.lowering.ir.operands import Kind
from quartet.lowering.ir.products import SWAP, flat, multiply, stacked, turned
from quartet.passes.sites import Found


def matrix(build: Builder, site: Found, node: Node, flipped: bool) -> Node:
    """``[batch·rows, cols]`` of an operand ``[batch, rows, cols]``, or of one that is stored transposed."""
    if site.batch is None:
        return build.transpose(node) if flipped else node
    return flat(build, build(aten.permute.default, node, SWAP) if flipped else node)


def flip(build: Builder, site: Found, x: Node) -> Node:
    """``[batch·cols, rows]`` of ``[batch·rows, cols]``: every matrix transposed."""
    if site.batch is None:
        return build.transpose(x)
    return turned(build, site.batch, x)


def product(build: Builder, site: Found, a: Node, b: Node) -> Node:
    """``A · Bᵀ`` of every matrix: ``[batch·M, K]`` and ``[batch·N, K]`` → ``[batch·M, N]``."""
    return multiply(build, Kind(site.batch), a, b)


def restored(build: Builder, site: Found, out: Node, flipped: bool) -> Node:
    """The inverse of :func:`matrix`, laid out as what follows a batched product expects it."""
    if site.batch is None:
        return build.transpose(out) if flipped else out
    out = stacked(build, site.batch, out)
    return build.contiguous(build(aten.permute.default, out, SWAP)) if flipped else out
