"""The recipes that a policy can name: the built-in ones, as data, and those that a user registers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.spec import QuantSpec
from quartet.lowering.recipe.op_classes import op_classes
from quartet.lowering.recipe.types import OP_CLASSES, Gemm, Operand, Recipe, Rotation, Saved
from quartet.nearest import did_you_mean


class PolicyError(ValueError):
    """A policy that cannot be: the message names the nearest legal value and lists what is possible.

    ``path`` leads to the culprit in the plain data of the policy, for example ``("rule", 2, "role")``.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path

    def under(self, *prefix: str | int) -> PolicyError:
        """The same error, seen from further out in the data."""
        return PolicyError(str(self), (*prefix, *self.path))


def unknown(what: str, name: object, legal: Iterable[str], path: tuple[str | int, ...] = ()) -> PolicyError:
    """The error for a name that does not exist."""
    legal = list(legal)
    return PolicyError(f"unknown {what} {name!r}; {did_you_mean(name, legal)}possible: {', '.join(legal)}", path)


def _gemm(a: str, b: str, rotation: Rotation | None = None, outer: Rotation | None = None) -> Gemm:
    """A GEMM whose operands are both quantised from the tensors themselves."""
    return Gemm(Operand(QuantSpec.parse(a)), Operand(QuantSpec.parse(b)), rotation, outer)


def _same(spec: str, rotation: Rotation | None = None) -> Gemm:
    """A GEMM whose operands are quantised alike."""
    return _gemm(spec, spec, rotation)


def _from_saved(spec: str, rotation: Rotation | None = None, gradient: str | None = None,
                outer: Rotation | None = None) -> Gemm:
    """A backward GEMM: operand a is the gradient, operand b starts from the codes that fprop saved."""
    return Gemm(Operand(QuantSpec.parse(gradient or spec)), Operand(QuantSpec.parse(spec), source="saved"), rotation,
                outer)


_QUARTET_BACKWARD = _from_saved("e2m1/32 e8m0 headroom stochastic", Rotation(32, "random"))
_STRAIGHT_THROUGH = Gemm(Operand(None), Operand(None, source="saved"))
_FP8_TENSOR = "e4m3/tensor fp32 amax nearest"
_FP8_ROW = "e4m3/row fp32 amax_pow2 nearest"
_FP8_BLOCK, _FP8_TILE = "e4m3/128 fp32 amax_pow2 nearest", "e4m3/128x128 fp32 amax_pow2 nearest"
_FP8_DELAYED, _FP8_GRADIENT = "e4m3/tensor fp32 delayed nearest", "e5m2/tensor fp32 delayed nearest"
_MXFP8 = "e4m3/32 e8m0 ceil nearest"
_NVFP4, _NVFP4_TILE = "e2m1/16 e4m3 amax nearest", "e2m1/16x16 e4m3 amax nearest"
_NVFP4_GRADIENT = "e2m1/16 e4m3 amax stochastic"
_NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_FP4_ROW, _E5M2_ROW, _E4M3_ROW = (f"{element}/row fp32 amax nearest" for element in ("e2m1", "e5m2", "e4m3"))
_INT8_ROW, _INT8_TENSOR = "int8/row fp32 amax nearest", "int8/tensor fp32 amax nearest"


def _halo(name: str, spec: str, level: int) -> Recipe:
    forward, outer = Rotation(32) if level >= 1 else None, Rotation(32) if level == 2 else None
    return Recipe(
        name=f"halo-{name}-{level}",
        summary=f"{name.upper()} with one scale a tensor, " + (
            "no rotation", "operands of forward rotated", "operands of forward and gradients rotated")[level],
        paper="HALO, arXiv 2501.02625",
        fprop=_same(spec, forward),
        dgrad=_from_saved(spec, outer=outer),
        wgrad=_from_saved(spec),
    )


def _saved(name: str, summary: str, paper: str, what: str) -> Recipe:
    return Recipe(name, summary, paper, skip=tuple(c for c in OP_CLASSES if c != "saved"), saved=Saved.parse(what))


_TETRAJET = Recipe(
    name="tetrajet",
    summary="MXFP4 without rotation: scales that never clip, stochastic gradients from the codes of forward",
    paper="TetraJet, arXiv 2502.20853",
    fprop=_same("e2m1/32 e8m0 ceil nearest"),
    dgrad=_from_saved("e2m1/32 e8m0 ceil stochastic"),
    wgrad=_from_saved("e2m1/32 e8m0 ceil stochastic"),
)
_SAVED = (
    _saved("e4m3/16", "saved activations in E4M3, one scale for 16 elements", "COAT, arXiv 2410.19313", "e4m3/16"),
    _saved("e4m3/16-attention", "the same, and also what a fused attention keeps", "COAT, arXiv 2410.19313",
           "e4m3/16 attention"),
    _saved("mesa8", "saved activations in 8 bits between minimum and maximum of 64, stochastic",
           "Mesa, arXiv 2111.11124", "uint8/64 stochastic"),
)

_BUILT_IN: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="quartet",
            summary="MXFP4 throughout: rotated, scales by the rounded largest magnitude, stochastic gradients",
            paper="Quartet, arXiv 2505.14669",
            fprop=_same("e2m1/32 e8m0 even nearest", Rotation(32, FLAT_SIGNS)),
            dgrad=_QUARTET_BACKWARD,
            wgrad=_QUARTET_BACKWARD,
            recompute="gemm",
        ),
        Recipe(
            name="quartet-paper",
            summary="quartet with forward's Gaussian-optimal clip, its masks and no signs, bit for bit as released",
            paper="Quartet, arXiv 2505.14669",
            fprop=_same("e2m1/32 e8m0 quest(centred,floor) nearest mask", Rotation(32)),
            dgrad=_QUARTET_BACKWARD,
            wgrad=_QUARTET_BACKWARD,
            recompute="gemm",
        ),
        Recipe(name="bf16", summary="rewrites nothing: every product stays in the model's dtype", skip=()),
        Recipe(
            name="fp8",
            summary="E4M3 with one scale a tensor from its current maximum; backward reads the codes of forward",
            paper="FP8 Formats for Deep Learning, arXiv 2209.05433",
            fprop=_same(_FP8_TENSOR),
            dgrad=_from_saved(_FP8_TENSOR),
            wgrad=_from_saved(_FP8_TENSOR),
        ),
        Recipe(
            name="fp8-rowwise",
            summary="E4M3 with a power-of-two scale for each row of every operand, each quantised from the original",
            paper="TorchAO, arXiv 2507.16099",
            fprop=_same(_FP8_ROW),
            dgrad=_same(_FP8_ROW),
            wgrad=_same(_FP8_ROW),
        ),
        Recipe(
            name="fp8-block",
            summary="E4M3 with a power-of-two scale for 128 elements of X and E, and for 128 by 128 of W",
            paper="DeepSeek-V3, arXiv 2412.19437",
            fprop=_gemm(_FP8_BLOCK, _FP8_TILE),
            dgrad=_gemm(_FP8_BLOCK, _FP8_TILE),
            wgrad=_same(_FP8_BLOCK),
        ),
        Recipe(
            name="fp8-delayed",
            summary="E4M3 and E5M2 for gradients, one scale a tensor from the largest magnitude of the last 1024 steps",
            paper="FP8 Formats for Deep Learning, arXiv 2209.05433",
            fprop=_same(_FP8_DELAYED),
            dgrad=_from_saved(_FP8_DELAYED, gradient=_FP8_GRADIENT),
            wgrad=_from_saved(_FP8_DELAYED, gradient=_FP8_GRADIENT),
        ),
        Recipe(
            name="fp8-trillion",
            summary="fp8-delayed with Smooth-SwiGLU; train it with quartet.optim's FP8 Adam",
            paper="Scaling FP8 Training to Trillion-Token LLMs, arXiv 2409.12517",
            fprop=_same(_FP8_DELAYED),
            dgrad=_from_saved(_FP8_DELAYED, gradient=_FP8_GRADIENT),
            wgrad=_from_saved(_FP8_DELAYED, gradient=_FP8_GRADIENT),
            smooth="channel",
        ),
        Recipe(
            name="mxfp8",
            summary="E4M3 with a power-of-two scale for 32 elements of every operand, each quantised from the original",
            paper="Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027",
            fprop=_same(_MXFP8),
            dgrad=_same(_MXFP8),
            wgrad=_same(_MXFP8),
        ),
        Recipe(
            name="nvfp4",
            summary="NVFP4: square blocks of W, signed H16 of wgrad's operands, stochastic gradients",
            paper="Pretraining LLMs with NVFP4, arXiv 2509.25149",
            fprop=_gemm(_NVFP4, _NVFP4_TILE),
            dgrad=_gemm(_NVFP4_GRADIENT, _NVFP4_TILE),
            wgrad=_gemm(_NVFP4_GRADIENT, _NVFP4, Rotation(16, _NVFP4_SIGNS)),
            keep=("last 15%",),
        ),
        Recipe(
            name="quartet2",
            summary="NVFP4: four-over-six forward, rotated backward with unbiased block scales (MS-EDEN)",
            paper="Quartet II, arXiv 2601.22813",
            fprop=_same("e2m1/16 e4m3 four_six nearest"),
            dgrad=_from_saved("e2m1/16 e4m3 eden stochastic", Rotation(128, "random")),
            wgrad=_from_saved("e2m1/16 e4m3 eden stochastic", Rotation(128, "random")),
        ),
        _TETRAJET,
        replace(
            _TETRAJET,
            name="tetrajet-ema",
            summary="tetrajet with weights that round toward their moving average (Q-EMA)",
            average=0.998,
        ),
        Recipe(
            name="fp4-dge",
            summary="FP4 forward with a scale a token and an output channel, outliers apart; FP8 gradients, W's by DGE",
            paper="Optimizing LLM Training Using FP4 Quantization, arXiv 2501.17116",
            fprop=_same(_FP4_ROW),
            dgrad=_from_saved(_E4M3_ROW, gradient=_E5M2_ROW),
            wgrad=_from_saved(_E4M3_ROW, gradient=_E5M2_ROW),
            estimator="dge",
            outliers=0.99,
        ),
        *(_halo("fp8", _FP8_TENSOR, level) for level in range(3)),
        *(_halo("int8", _INT8_TENSOR, level) for level in range(3)),
        Recipe(
            name="int8",
            summary="INT8 forward and dgrad, X and E with a scale a row, W with one; wgrad in high precision",
            paper="SwitchBack, arXiv 2304.13013",
            fprop=_gemm(_INT8_ROW, _INT8_TENSOR),
            dgrad=_from_saved(_INT8_TENSOR, gradient=_INT8_ROW),
        ),
        Recipe(
            name="int8-all",
            summary="int8, and wgrad too, with a scale for each row of its operands",
            paper="SwitchBack, arXiv 2304.13013",
            fprop=_gemm(_INT8_ROW, _INT8_TENSOR),
            dgrad=_from_saved(_INT8_TENSOR, gradient=_INT8_ROW),
            wgrad=_same(_INT8_ROW),
        ),
        Recipe(
            name="bitnet",
            summary="ternary W by its mean magnitude, INT8 X a token; gradients straight through, in high precision",
            paper="BitNet b1.58, arXiv 2402.17764",
            fprop=_gemm(_INT8_ROW, "ternary/tensor fp32 absmean nearest"),
            dgrad=_STRAIGHT_THROUGH,
            wgrad=_STRAIGHT_THROUGH,
        ),
        *_SAVED,
    )
}
_registered: dict[str, Recipe] = {}


def recipes() -> Mapping[str, Recipe]:
    """A read-only mapping of name to recipe: the built-in ones in their order, then those registered."""
    return MappingProxyType({**_BUILT_IN, **_registered})


def built_in() -> list[Recipe]:
    """The recipes that come with the package, in their order."""
    return list(_BUILT_IN.values())


def register(recipe: Recipe) -> Recipe:
    """Let policies name ``recipe``, and return it. Registering the name again replaces a user's own recipe.

    Policies that already exist keep the recipe they were built with.

    Raises:
        PolicyError: the name is taken by a built-in recipe that differs, is reserved, or the recipe skips an op
            class that does not exist.
    """
    check(recipe)
    if recipe.name not in _BUILT_IN:
        _registered[recipe.name] = recipe
    return recipe


def resolve(recipe: str | Recipe | None) -> Recipe | None:
    """The recipe of a name; a Recipe is checked and returned, and None (leave in high precision) stays None.

    Raises:
        PolicyError: unknown name, or not a recipe.
    """
    if recipe is None:
        return None
    if isinstance(recipe, Recipe):
        return check(recipe)
    if not isinstance(recipe, str):
        raise PolicyError(f"a recipe is a name, a Recipe or None, not {type(recipe).__name__} {recipe!r}", ("recipe",))
    if recipe == "none":
        raise PolicyError("recipe 'none' is written None: it leaves a matmul in high precision", ("recipe",))
    if (found := _BUILT_IN.get(recipe) or _registered.get(recipe)) is None:
        raise unknown("recipe", recipe, recipes(), ("recipe",))
    return found


def reference(recipe: str | Recipe | None) -> str | Recipe | None:
    """How a policy stores a recipe: a built-in one by name, any other as the Recipe itself, so that the policy
    means the same in another process and after the name is registered anew."""
    found = resolve(recipe)
    return found.name if found is not None and found.name in _BUILT_IN else found


def check(recipe: Recipe) -> Recipe:
    """Return ``recipe`` if a policy can hold it, otherwise raise PolicyError."""
    if not isinstance(recipe, Recipe):
        raise PolicyError(f"expected a Recipe, got {type(recipe).__name__} {recipe!r}")
    name = recipe.name
    if not isinstance(name, str) or not name.isprintable() or not name.strip():
        raise PolicyError(f"a recipe needs a printable name, got {name!r}")
    if name in ("none", "auto") or name.endswith(".toml"):
        raise PolicyError(f"recipe name {name!r} is reserved: 'none' stands for high precision, 'auto' for a policy "
                          "and '….toml' for a file")
    if recipe != _BUILT_IN.get(name, recipe):
        raise PolicyError(f"recipe {name!r} is built in and differs from this one; give yours another name, "
                          f"for example dataclasses.replace(recipe, name='my-{name}')")
    if not (recipe.quantizes or recipe.saved or name in _BUILT_IN):
        raise PolicyError(f"recipe {name!r} quantises nothing: give it fprop, dgrad, wgrad or saved; None in its place "
                          "leaves a matmul in high precision")
    if not isinstance(recipe.skip, tuple):
        raise PolicyError(f"recipe {name!r}: skip is a tuple of op classes, not {type(recipe.skip).__name__}",
                          ("skip",))
    for op in recipe.skip:
        if op not in op_classes():
            raise unknown(f"op class in skip of recipe {name!r}:", op, op_classes(), ("skip",))
    return recipe
