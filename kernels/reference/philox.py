"""Philox4x32-10 (Salmon et al., SC 2011) in int64 tensor arithmetic, and the random bits we draw from it.

The key is a 64-bit seed; the counter is (group low, group high, site, stream). One call serves a
group of 16 elements with 8 fresh bits each, so every element's bits are a pure function of
(seed, site, flat index): the same on every backend.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

GROUP = 16  # elements served by one Philox call
WINDOWS = (0, 7, 16, 23)  # where the nine bits of each of a word's four elements start
ROUNDING_STREAM = 0
SIGN_STREAM = 1
MAX_SITE = 2**28 - 1  # linear layers that one seed can serve: 16 draws each in a 32-bit counter word

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

Word = TypeVar("Word", Tensor, int)


class Draw(IntEnum):
    """The random things in one linear layer, in the order that numbers their bits.

    dgrad is ``E · W`` (a = E, b = W, contracts ``out``), wgrad is ``Eᵀ · X`` (a = Eᵀ, b = Xᵀ, contracts
    ``tokens``). ``Draw.X.of(site)`` is the ``site`` argument of :func:`random_bits` and :func:`random_signs`.
    """

    DGRAD_SIGNS = 0
    DGRAD_A = 1
    DGRAD_B = 2
    WGRAD_SIGNS = 3
    WGRAD_A = 4
    WGRAD_B = 5
    FPROP_SIGNS = 6
    FPROP_A = 7
    FPROP_B = 8

    def of(self, site: int) -> int:
        """``site · 16 + self``. ``site``: which linear layer of the graph, 0…2^28−1; ValueError outside."""
        if not 0 <= site <= MAX_SITE:
            raise ValueError(f"site {site} has no random bits of its own; number the layers 0…{MAX_SITE}")
        return site * 16 + int(self)


def philox4x32(counter: tuple[Word, ...], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Ten rounds. ``counter``: four uint32 words, int64 tensors or Python ints; ``key``: two; returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # int64 wraps; the 64 bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _call(seed: Tensor, group: Tensor, site: int | Tensor, stream: int) -> Tensor:
    """Words of each group: int64 ``[groups, 4]``."""
    seed = seed.reshape(()).to(torch.int64)
    zero = torch.zeros_like(group)
    counter = (group & _LOW, (group >> 32) & _LOW, zero + site, zero + stream)
    return torch.stack(philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW)), dim=-1)


def random_bits(seed: Tensor, site: int, rows: int, cols: int) -> Tensor:
    """Nine random bits an element of a row-major ``[rows, cols]`` tensor, as int64 in 0…511.

    Element 16g + 4k + j has the bits of word k of call g from bit 0, 7, 16 or 23 on, for j = 0…3. Each is uniform;
    elements 4i and 4i + 1 share two bits, the highest of the first and the lowest of the second, and so do 4i + 2 and
    4i + 3. Everything else is independent.

    ``cols`` must be a multiple of 16. ``seed``: int64 scalar tensor. ``site``: 0…2^32−1.
    """
    group = torch.arange(rows * (cols // GROUP), device=seed.device)
    words = _call(seed, group, site, ROUNDING_STREAM)
    return torch.stack([words >> start & 0x1FF for start in WINDOWS], dim=-1).reshape(rows, cols)


def random_signs(seed: Tensor, site: int, n: int) -> Tensor:
    """``n`` ≤ 128 random signs ±1 as float32; bit i of the call's 128 bits makes sign i negative when set."""
    return sign_table(seed, site, 1, n)[0]


def sign_table(seed: Tensor, first: int, count: int, n: int) -> Tensor:
    """:func:`random_signs` of the sites ``first``, ``first + 1``, …: float32 ``[count, n]``."""
    sites = first + torch.arange(count, device=seed.device)
    words = _call(seed, torch.zeros_like(sites), sites, SIGN_STREAM)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=seed.device)) & 1
    return (1 - 2 * bits.reshape(count, -1)[:, :n]).to(torch.float32)


def random_signs_of_int(seed: int, site: int, n: int) -> Tensor:
    """:func:`random_signs` of a seed whose value is at hand, in Python integers: about 100 tensor ops fewer."""
    words = philox4x32((0, 0, site, SIGN_STREAM), (seed & _LOW, (seed >> 32) & _LOW))
    bits = sum(word << (32 * i) for i, word in enumerate(words))
    return torch.tensor([-1.0 if bits >> i & 1 else 1.0 for i in range(n)], dtype=torch.float32, device="cpu")
