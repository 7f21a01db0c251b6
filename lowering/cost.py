"""What a linear layer's forward and backward cost on a device, quantised or not, in seconds.

Every kernel's time is a line in what it works on, with constants measured on the device (``rates.py``):

    product    2·m·n·k / flops + m·n·element + launch
    a pass     elements·element + launch

A kernel that has been measured brings the price of its products with the passes around them (``Kernel.price``); here
the three products of a layer are added up. What several layers make of the same X is divided among them. Sizes may be
symbols of sympy's: so is the result then, and ``break_even`` solves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import sympy

from quartet.lowering.rates import Rates
from quartet.lowering.recipe.types import Recipe

M, N, K = sympy.symbols("m n k", positive=True)
Size = Any  # int or sympy expression


@dataclass(frozen=True)
class Layer:
    """What has to be known of one layer ``[m, k] · [n, k]ᵀ`` to tell its cost.

    Args:
        kernels: role → the kernel that its product gets, None for none of ours; a role that is missing has no product.
        m, n, k: tokens, out, in.
        sharing: how many layers quantise the same X.
        recompute: backward runs the product of forward again, whose result it needs.
    """

    kernels: Mapping[str, Priced | None]
    m: Size = M
    n: Size = N
    k: Size = K
    sharing: int = 1
    recompute: bool = False

    def dims(self, role: str) -> tuple[Size, Size, Size]:
        return {"fprop": (self.m, self.n, self.k), "dgrad": (self.m, self.k, self.n),
                "wgrad": (self.n, self.k, self.m)}[role]

    def price(self, rates: Rates, recipe: Recipe, role: str) -> Size | None:
        """Seconds of a quantised product with the passes around it, or None where they are not known."""
        kernel = self.kernels[role]
        return None if kernel is None else kernel.price(rates, recipe, self, role)

    def operands(self, role: str) -> tuple[Size, Size]:
        """Elements that are quantised for a product: of A and of B; of an X its share."""
        x, w, e = self.m * self.k / sympy.Integer(self.sharing), self.n * self.k, self.m * self.n
        return {"fprop": (x, w), "dgrad": (e, w), "wgrad": (e, x)}[role]

    def result(self, role: str) -> Size:
        """Elements of a product's result."""
        rows, columns, _ = self.dims(role)
        return rows * columns


Price = Callable[[Rates, Recipe, Layer, str], Size | None]
"""(rates of the device, recipe, layer, role) → seconds that a kernel takes for the product of that role, whose GEMM the
recipe quantises, and for the passes around it that are not another product's; None where it has not been measured."""


class Priced(Protocol):
    """A kernel, as the cost model sees it."""

    @property
    def name(self) -> str: ...

    @property
    def price(self) -> Price: ...


def unmeasured(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> None:
    """The price of a kernel that computes the numbers only."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a layer's products and of the passes around them: as a recipe has it, and in the model's dtype."""

    quantized: Size
    plain: Size

    @property
    def pays(self) -> bool:
        return bool(self.quantized < self.plain)

    def __str__(self) -> str:
        return f"{1e6 * float(self.quantized):.0f} µs quantised, {1e6 * float(self.plain):.0f} µs in the model's dtype"


def predict(recipe: Recipe, layer: Layer, rates: Rates) -> Cost | None:
    """Cost of a layer under a recipe, or None where one of the kernels that it takes has no price."""
    roles = {role for role in layer.kernels if getattr(recipe, role) is not None}
    recipe = recipe.only(roles)
    plain = {role: rates.product("bf16", *layer.dims(role)) for role in layer.kernels}
    prices = [layer.price(rates, recipe, role) if role in roles else plain[role] for role in layer.kernels]
    if not roles or any(price is None for price in prices):
        return None
    return Cost(sum(prices), sum(plain.values()))


def break_even(recipe: Recipe, layer: Layer, rates: Rates) -> float:
    """The width n = k from which on the recipe pays at ``layer.m`` tokens; infinite if it never does."""
    cost = predict(recipe, layer, rates)
    if cost is None:
        return float("inf")
    gain = sympy.expand((cost.plain - cost.quantized).subs({N: K}))
    roots = sympy.Poly(gain, K).nroots(n=8)
    real = [float(r) for r in roots if r.is_real and r > 0]
    return max(real) if real and gain.subs(K, 2 * max(real)) > 0 else float("inf")
