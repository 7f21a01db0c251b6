"""The 64-bit Philox seed of an optimizer's stochastic rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

_FROM = 1 << 62  # so that no seed has a zero half


def philox_seed(groups: Sequence[dict[str, Any]], generator: torch.Generator | None) -> int:
    """A seed in [2^62, 2^63), drawn from ``generator``, or made of ``torch.manual_seed``'s and the parameters' shapes.

    Without a generator nothing is drawn: PyTorch's own is left as it is. Optimizers of the same shapes in one process
    then have the same seed; that of a sharded model is that of the whole one.
    """
    if generator is not None:
        return _FROM + int(torch.randint(0, _FROM, (), generator=generator, device=generator.device).item())
    known = repr((torch.initial_seed(), [[tuple(p.shape) for p in group["params"]] for group in groups]))
    return _FROM + int.from_bytes(hashlib.blake2b(known.encode(), digest_size=8).digest()) % _FROM
