"""What a linear layer's forward and backward cost on a device, quantised or not, in seconds.

Every kernel's time is a line in what it works on, with constants of the device (``rates``):

    product    2·m·n·k / flops + m·n·element + launch
    a pass     elements·element + launch
    the host   launches·host + what its graph takes to be called / layers

A kernel whose speed is known brings the price of its products with the passes around them (``Kernel.price``); here the
three products of a layer are added up. What several layers make of the same X is divided among them. A layer takes the
longer of the device's time and the host's, in which the launches of its neighbours count too and their time does not:
so a step that the host limits is told from one that it does not, layer by layer. Sizes may be symbols of sympy's: so is
the device's time then, and ``break_even`` solves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import sympy

from quartet.lowering.rates.constants import NEIGHBOURS, Rates, Time
from quartet.lowering.recipe.types import Recipe

M, N, K = sympy.symbols("m n k", positive=True)
Size = Any  # int or sympy expression


@dataclass(frozen=True)
class Layer:
    """What has to be known of one layer ``[m, k] · [n, k]ᵀ`` to tell its cost.

    Args:
        kernels: role → the kernel that its product gets, None for none of ours; a role that is missing has no product.
        m, n, k: tokens, out, in; of a batch those of one of its matrices.
        sharing: how many layers quantise the same X.
        recompute: backward runs the product of forward again, whose result it needs.
        groups: how many weights the tokens are divided among; 0 for one weight.
        batch: how many such layers are multiplied at once.
        summed: the gradients of a shared X are added up in the basis of its codes, and leave it together.
        called: its part of what a graph takes to be called: 1 of a model that has one layer.
    """

    kernels: Mapping[str, Priced | None]
    m: Size = M
    n: Size = N
    k: Size = K
    sharing: int = 1
    recompute: bool = False
    groups: Size = 0
    batch: Size = 1
    summed: bool = False
    called: float = 0.0

    @property
    def share(self) -> float:
        """This layer's of a launch that its X, or the gradients that meet one X, take."""
        return 1 / self.sharing

    @property
    def several(self) -> bool:
        """Whether it is one of groups or batches."""
        return self.groups != 0 or self.batch != 1

    def dims(self, role: str) -> tuple[Size, Size, Size]:
        return {"fprop": (self.m, self.n, self.k), "dgrad": (self.m, self.k, self.n),
                "wgrad": (self.n, self.k, self.m)}[role]

    def price(self, rates: Rates, recipe: Recipe, role: str) -> Time | None:
        """A quantised product with the passes around it, or None where that is not known."""
        kernel = self.kernels[role]
        price = None if kernel is None else kernel.price(rates, recipe, self, role)
        return price if price is None or isinstance(price, Time) else Time(price)

    def product(self, rates: Rates, dtype: str, role: str) -> Any:
        """:class:`Time` of a product of operands of a dtype; None where there are no rates for them."""
        return rates.products(dtype, 2 * self.batch * self.m * self.n * self.k, self.result(role), self.several)

    def operands(self, role: str) -> tuple[Size, Size]:
        """Elements that are quantised for a product: of A and of B; of an X its share."""
        x, e = self.batch * self.m * self.k / sympy.Integer(self.sharing), self.batch * self.m * self.n
        w = self._weights * self.n * self.k
        return {"fprop": (x, w), "dgrad": (e, w), "wgrad": (e, x)}[role]

    def result(self, role: str) -> Size:
        """Elements of a product's result."""
        rows, columns, _ = self.dims(role)
        return rows * columns * (self._weights if role == "wgrad" else self.batch)

    @property
    def _weights(self) -> Size:
        return self.groups or self.batch


Price = Callable[[Rates, Recipe, Layer, str], Any]
"""(rates of the device, recipe, layer, role) → what a kernel takes for the product of that role, whose GEMM the recipe
quantises, and for the passes around it that are not another product's: a ``Time``, or seconds of one launch; None where
it has not been measured."""


class Priced(Protocol):
    """A kernel, as the cost model sees it."""

    @property
    def name(self) -> str: ...

    @property
    def price(self) -> Price: ...


def unmeasured(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> None:
    """The price of a kernel of whose speed nothing is known."""


def simulated(rates: Rates, recipe: Recipe, layer: Layer, role: str) -> None:
    """The price of a kernel that multiplies in the model's dtype: it computes the numbers, and can save no time."""


@dataclass(frozen=True)
class Cost:
    """What a layer's products and the passes around them take: as a recipe has it, and in the model's dtype.

    Args:
        quantized, plain: seconds of the device.
        host, plain_host: seconds of the host to launch them and their neighbours.
        margin: of the time in the model's dtype, what has to be saved to be worth it.
    """

    quantized: Size
    plain: Size
    host: Size = 0.0
    plain_host: Size = 0.0
    margin: float = 0.0

    @property
    def step(self) -> float:
        """Seconds as the recipe has it, of the device or the host, whichever takes longer."""
        return max(float(self.quantized), float(self.host))

    @property
    def plain_step(self) -> float:
        """The same in the model's dtype."""
        return max(float(self.plain), float(self.plain_host))

    @property
    def pays(self) -> bool:
        return self.step < (1 - self.margin) * self.plain_step

    def __str__(self) -> str:
        limited = f", {_us(self.host)} of the host" if float(self.host) > float(self.quantized) else ""
        return f"{_us(self.quantized)} quantised{limited}, {_us(self.plain)} in the model's dtype"


def _us(seconds: Size) -> str:
    return f"{1e6 * float(seconds):.0f} µs"


def predict(recipe: Recipe, layer: Layer, rates: Rates) -> Cost | None:
    """Cost of a layer under a recipe, or None where one of the kernels that it takes has no price."""
    roles = {role for role in layer.kernels if getattr(recipe, role) is not None}
    recipe = recipe.only(roles)
    plain = {role: layer.product(rates, "bf16", role) for role in layer.kernels}
    ours = {role: layer.price(rates, recipe, role) for role in roles}
    if not roles or any(price is None for price in (*ours.values(), *plain.values())):
        return None
    quantized = sum(({**plain, **ours}).values(), Time(0, 0))
    before, host, around = sum(plain.values(), Time(0, 0)), rates.host, NEIGHBOURS * len(plain)
    left = sum((1 for role in plain if role not in ours), around)
    launched = host.ours * sum(price.launches for price in ours.values() if price) + host.plain * left
    return Cost(quantized.device, before.device, launched + layer.called * (host.call + host.begun),
                host.plain * (before.launches + around) + layer.called * host.call, rates.origin.margin)


def break_even(recipe: Recipe, layer: Layer, rates: Rates) -> float:
    """The width n = k from which on the recipe pays at ``layer.m`` tokens; infinite if it never does."""
    cost = predict(recipe, layer, rates)
    if cost is None:
        return float("inf")
    kept = (1 - cost.margin) * cost.plain
    return max(_root(kept - cost.quantized), _root(kept - cost.host))


def _root(gain: Size) -> float:
    """From which width on a gain is positive; infinite if from none."""
    gain = sympy.expand(sympy.sympify(gain).subs({N: K}))
    real = [float(r) for r in sympy.Poly(gain, K).nroots(n=8) if r.is_real and r > 0]
    beyond = 2 * max(real, default=1.0)
    return max(real, default=0.0) if gain.subs(K, beyond) > 0 else float("inf")
