"""What a linear layer's forward and backward cost on a device, quantised or not, in seconds.

Every kernel's time is a line in what it works on, with constants measured on the device (``rates.py``):

    product    2·m·n·k / flops + m·n·element + launch
    a pass     elements·element + launch

The three products and the passes around them are added up. What several layers make of the same X is divided among
them. Sizes may be symbols of sympy's: so is the result then, and ``break_even`` solves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy

from quartet.lowering.ir.decompositions import RADICES
from quartet.lowering.rates import Rates
from quartet.lowering.recipe.types import Gemm, Recipe

FP8_KERNELS = ("triton-fp8", "cublaslt")
M, N, K = sympy.symbols("m n k", positive=True)
Size = Any  # int or sympy expression
Pass = tuple[str, Size]  # name in Rates.passes, elements


@dataclass(frozen=True)
class Layer:
    """What has to be known of one layer ``[m, k] · [n, k]ᵀ`` to tell its cost.

    Args:
        kernels: role → the kernel that its product gets, "" for none of ours; a role that is missing has no product.
        m, n, k: tokens, out, in.
        sharing: how many layers quantise the same X.
        recompute: backward runs the product of forward again, whose result it needs.
    """

    kernels: dict[str, str]
    m: Size = M
    n: Size = N
    k: Size = K
    sharing: int = 1
    recompute: bool = False

    def dims(self, role: str) -> tuple[Size, Size, Size]:
        return {"fprop": (self.m, self.n, self.k), "dgrad": (self.m, self.k, self.n),
                "wgrad": (self.n, self.k, self.m)}[role]


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
    """Cost of a layer under a recipe, or None where one of its kernels is not in ``FP8_KERNELS``: those compute the
    numbers only, and no rates of them are measured."""
    gemms = {role: gemm for role in layer.kernels if (gemm := getattr(recipe, role)) is not None}
    if not gemms or any(layer.kernels[role] not in FP8_KERNELS for role in gemms):
        return None
    plain = sum(rates.product("bf16", *layer.dims(role)) for role in layer.kernels)
    total = sum(rates.product("fp8" if role in gemms else "bf16", *layer.dims(role)) for role in layer.kernels)
    total += sum(rates.of_pass(name, elements) for name, elements in _passes(recipe, gemms, layer))
    if layer.recompute and "fprop" in gemms:
        total += rates.product("fp8", *layer.dims("fprop"))
    return Cost(total, plain)


def break_even(recipe: Recipe, layer: Layer, rates: Rates) -> float:
    """The width n = k from which on the recipe pays at ``layer.m`` tokens; infinite if it never does."""
    cost = predict(recipe, layer, rates)
    if cost is None:
        return float("inf")
    gain = sympy.expand((cost.plain - cost.quantized).subs({N: K}))
    roots = sympy.Poly(gain, K).nroots(n=8)
    real = [float(r) for r in roots if r.is_real and r > 0]
    return max(real) if real and gain.subs(K, 2 * max(real)) > 0 else float("inf")


def _passes(recipe: Recipe, gemms: dict[str, Gemm], layer: Layer) -> Iterator[Pass]:
    x, w, e = layer.m * layer.k, layer.n * layer.k, layer.m * layer.n
    shared = x / sympy.Integer(layer.sharing)
    for role, gemm in gemms.items():
        fused = layer.kernels[role] == "triton-fp8"
        operands = {"fprop": (shared, w), "dgrad": (e, w), "wgrad": (e, shared)}[role]
        saved = gemm.b.source == "saved"
        if not fused:
            yield from _rotations(recipe, role, gemm, operands, {"fprop": e, "dgrad": x, "wgrad": w}[role])
            yield from _casts(role, gemm, gemms, operands)
        elif role == "fprop":
            yield from (("rows", elements) for elements in operands)
            if layer.recompute:
                yield from (("fold", elements) for elements in operands)
        else:
            if not {"dgrad", "wgrad"} <= gemms.keys():
                yield "one axis", e
            elif role == "dgrad":
                yield "both axes", e
            yield "fold", e
            yield "requantise" if saved else "one axis", operands[1]
            yield "fold", operands[1]
            if saved and recipe.fprop is not None and recipe.fprop.rotation is not None:
                yield "unrotate", {"dgrad": x, "wgrad": w}[role]


def _casts(role: str, gemm: Gemm, gemms: dict[str, Gemm], operands: tuple[Size, Size]) -> Iterator[Pass]:
    """FP8 with a scale a tensor or a row: the largest magnitude is a reading of its own before each cast."""
    whole = gemm.a.spec is not None and gemm.a.spec.block == "tensor"
    other = gemms.get("dgrad")
    again = (whole and role == "wgrad" and other is not None  # one cast of E writes its transpose too
             and (other.rotation, other.outer) == (gemm.rotation, gemm.outer))
    fresh = operands if role == "fprop" or not whole else () if again else operands[:1]
    for elements in fresh:
        yield "amax", elements
        yield "cast", elements


def _rotations(recipe: Recipe, role: str, gemm: Gemm, operands: tuple[Size, Size], result: Size) -> Iterator[Pass]:
    """Hadamard transforms in generated code: to fp32, then a loop for each stage, of twice a fused one's traffic."""
    turned = [(gemm.rotation, elements) for elements in operands] + [(gemm.outer, operands[0]), (gemm.outer, result)]
    if gemm.b.source == "saved" and recipe.fprop is not None:
        turned.append((recipe.fprop.rotation, result))
    for rotation, elements in turned:
        if rotation is not None:
            yield from [("unrotate", 2 * elements)] * (1 + len(RADICES[rotation.n]))
