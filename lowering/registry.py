"""Which kernel computes which piece of the quantised IR, and why another one does not.

A kernel registers for a chain of semantic ops. ``supports`` gives None or the reason it declines, ``price`` what it
takes; the first in ``KERNELS`` that accepts is taken. The reference stands last: it takes everything. :func:`register`
puts a program's own among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from quartet.kernels import extension
from quartet.kernels.extension import ExtensionError
from quartet.kernels.spec import ELEMENTS, QuantSpec
from quartet.lowering.cost import Price, simulated, unmeasured
from quartet.lowering.ir import FLOAT8, SCALED_BMM, SCALED_MM, providers
from quartet.lowering.ir.ops.grouped import SCALED_GROUPED_MM, TOKENS
from quartet.lowering.recipe.types import Gemm
from quartet.lowering.targets import fp8_products
from quartet.lowering.targets.blackwell import block_scaled
from quartet.lowering.targets.blackwell import library as scaled_mm
from quartet.lowering.targets.blackwell import lower as blackwell
from quartet.lowering.targets.blackwell import price as blackwell_price
from quartet.lowering.targets.chains import Accepts
from quartet.lowering.targets.cpu import lower as cpu
from quartet.lowering.targets.fp8 import lower as fp8
from quartet.lowering.targets.fp8 import price as fp8_price
from quartet.lowering.targets.fp8.experts import makes_codes
from quartet.lowering.targets.int8 import lower as int8
from quartet.lowering.targets.int8 import price as int8_price
from quartet.lowering.targets.triton import lower as cuda
from quartet.lowering.targets.triton import price as cuda_price
from quartet.runtime.compat import OpOverload
from quartet.runtime.devices import Target

Supports = Callable[[Target, torch.dtype, QuantSpec, int], str | None]
SupportsPair = Callable[[QuantSpec, QuantSpec], str | None]
SupportsKind = Callable[[Target, OpOverload], str | None]
Lower = Callable[[Graph, list[Node], Accepts], None]
Operands = tuple[tuple[QuantSpec, int], tuple[QuantSpec, int]]  # A and B: quantiser, Hadamard size before it or 0


QUANTIZED = (torch.float32, torch.bfloat16, torch.float16)  # what quantisers take
_CALLED = {SCALED_MM: "matrices", SCALED_BMM: "batches of matrices", SCALED_GROUPED_MM: "groups"}


def _among(product: OpOverload, *taken: OpOverload) -> str | None:
    return None if product in taken else f"multiplies {' and '.join(_CALLED[t] for t in taken)}, not {_CALLED[product]}"


def matrices(target: Target, product: OpOverload) -> str | None:
    """``Kernel.supports_kind`` of what multiplies two matrices only."""
    return _among(product, SCALED_MM)


class Variant(NamedTuple):
    """What a family does otherwise under an option of the compilation.

    Attributes:
        option, value: a field of ``quartet.passes.compilation.Compilation``, and what it is then.
        rewrite: of a graph in which the family has lowered its products.
    """

    option: str
    value: Any
    rewrite: Callable[[Graph], None]


@dataclass(frozen=True)
class Kernel:
    """A family of kernels that runs a GEMM's chains on one kind of device.

    Attributes:
        name: what ``explain`` prints and ``disable_kernels`` takes.
        supports: (target, compute dtype, quantiser, Hadamard size or 0) → None, or why not.
        lower: (graph, its products' nodes, what it accepts) → rewrites them; None leaves the semantic ops as they are.
        supports_pair: (quantiser of A, of B), each of them supported → None, or why not the two together.
        supports_kind: (target, ``scaled_mm``, ``scaled_bmm`` or ``scaled_grouped_mm`` of the IR) → None, or why not.
        reads: the question of ``supports`` with the dtype of what is quantised, where the product's is another matter.
        align: what the kernel pads the contraction axis to a multiple of.
        group_align: what it needs the tokens of a group to be a multiple of where it contracts them.
        price: what ``quartet.lowering.cost`` adds up, see there; without it the kernel is not measured.
        variants: what options change about it.
        row_major: it reads codes that lie row by row, so that codes and their transpose are two tensors.
        makes_codes: whether its products of groups make the codes of a quantiser of weights themselves, once an
            optimizer step where they may be kept; backward then makes its own.
        opaque: its quantisers are ops of their own, which read tensors that lie in memory, rounded to their dtype.
    """

    name: str
    summary: str
    supports: Supports
    lower: Lower | None = None
    supports_pair: SupportsPair = lambda a, b: None
    align: int = 1
    group_align: int = TOKENS
    reads: Supports | None = None
    supports_kind: SupportsKind = matrices
    price: Price = unmeasured
    variants: tuple[Variant, ...] = ()
    row_major: bool = False
    makes_codes: Callable[[Node], bool] = lambda quantizer: False
    opaque: bool = False

    def refuses(self, target: Target, dtype: torch.dtype, operands: Operands, product: OpOverload) -> str | None:
        """None where the kernel computes a product of these operands into ``dtype``, else why not."""
        reasons = (self.supports(target, dtype, spec, rotation) for spec, rotation in operands)
        reason = next((reason for reason in reasons if reason is not None), None)
        return (reason or self.supports_pair(*(spec for spec, _ in operands))
                or self.supports_kind(target, product))

    def takes(self, target: Target, spec: QuantSpec, rotation: int, dtype: torch.dtype) -> bool:
        """Whether the kernel quantises a tensor of this dtype in such a chain."""
        return (self.reads or self.supports)(target, dtype, spec, rotation) is None


def _every(target: Target, product: OpOverload) -> str | None:
    return None


def _groups_and_batches(target: Target, product: OpOverload) -> str | None:
    return _among(product, SCALED_BMM, SCALED_GROUPED_MM) or fp8_products.supports_kind(target, product)


def _inductor(target: Target, dtype: torch.dtype, spec: QuantSpec, rotation: int) -> str | None:
    if target.type not in ("cpu", "cuda"):
        return f"Inductor has no code generator of ours for {target.type}"
    return not_generated(target, spec)


def not_generated(target: Target, *specs: QuantSpec) -> str | None:
    """Why code that Inductor generates for a GPU cannot make or read one of these formats; None where it can."""
    formats = [name for spec in specs for name in (spec.element, spec.scale) if name in FLOAT8]
    reason = target.lacks("fp8 conversions") if formats else None
    return reason and f"generated code has no {min(formats)} here: {reason}; take a recipe in INT8 or MXFP4, or bf16"


_PROMOTED = Variant("accumulation", "promoted", fp8_products.promote)
_PORTABLE = Variant("portable_rounding", True, blackwell.use_integers)
_TUNED = Variant("autotune", True, block_scaled.autotune)

KERNELS: tuple[Kernel, ...] = (
    Kernel("cpp", "fused C++ quantisers, dequantise + matmul in the model's dtype", cpu.supports, cpu.lower,
           supports_kind=_every, group_align=1, opaque=True),
    Kernel("cutlass", "block-scaled tensor cores through CUTLASS; of MXFP4 fused Triton quantisers",
           block_scaled.supports_cutlass, block_scaled.lower_cutlass, block_scaled.supports_pair, reads=cuda.supports,
           price=blackwell_price.block_scaled, variants=(_PORTABLE, _TUNED)),
    Kernel("scaled-mm", "block-scaled tensor cores through torch.nn.functional.scaled_mm", scaled_mm.supports,
           scaled_mm.lower, scaled_mm.supports_pair, reads=cuda.supports, price=blackwell_price.block_scaled,
           variants=(_PORTABLE,)),
    Kernel("dot-scaled", "fused Triton quantisers, block-scaled FP4 tensor cores through Triton", blackwell.supports,
           blackwell.lower_dot, reads=cuda.supports, price=blackwell_price.dot_scaled, variants=(_PORTABLE,),
           opaque=True),
    Kernel("triton-fp8", "fused Triton quantisers, an exact fold to E4M3, FP8 tensor cores", cuda.supports_fold,
           cuda.lower_fold, reads=cuda.supports, supports_kind=fp8_products.supports_kind, price=cuda_price.folded,
           variants=(_PROMOTED,), opaque=True),
    Kernel("cublaslt", "FP8 tensor cores through torch._scaled_mm", fp8.supports, fp8.lower,
           fp8_products.supports_pair, fp8_products.ALIGN, price=fp8_price.cast, variants=(_PROMOTED,), row_major=True),
    Kernel("fp8-grouped", "FP8 tensor cores through torch._scaled_grouped_mm, for groups and batches",
           fp8.supports_grouped, fp8.lower, fp8_products.supports_pair, fp8_products.ALIGN,
           supports_kind=_groups_and_batches, price=fp8_price.cast, variants=(_PROMOTED,), row_major=True,
           makes_codes=makes_codes),
    Kernel("int-mm", "exact products of INT8 in int32 through torch._int_mm", int8.supports, int8.lower,
           align=int8.ALIGN, price=int8_price.integers),
    Kernel("triton", "fused Triton quantisers, dequantise + matmul in the model's dtype", cuda.supports,
           cuda.lower_plain, supports_kind=_every, price=simulated, opaque=True),
    Kernel("inductor", "the reference decomposed into Inductor's IR, fused with its neighbours", _inductor,
           supports_kind=lambda target, product: _among(product, SCALED_MM, SCALED_BMM), price=simulated),
    Kernel("grouped-mm", "the reference's groups, dequantised and multiplied in the model's dtype", _inductor,
           supports_kind=lambda target, product: _among(product, SCALED_GROUPED_MM), price=simulated),
)
NAMES: tuple[str, ...] = tuple(kernel.name for kernel in KERNELS)
_KIND, _OTHER_NAMES = "kernel", ("reference",)  # what reports call that is in no list


def register(kernel: Kernel, before: str = "inductor") -> Kernel:
    """Prefer ``kernel`` to the one called ``before`` and to all after it, and return it; the same one again changes
    nothing.

    Raises:
        ExtensionError: a name that is taken, or no kernel called ``before``.
    """
    if not isinstance(kernel, Kernel):
        raise ExtensionError(f"expected a quartet.extend.Kernel, not {type(kernel).__name__} {kernel!r}")
    if kernel in KERNELS:
        return kernel
    extension.check_name(_KIND, kernel.name, (*NAMES, *_OTHER_NAMES))
    if before not in NAMES:
        near = get_close_matches(before, NAMES, n=1)
        raise ExtensionError(f"kernel {kernel.name!r}: no kernel {before!r} to stand before; "
                             f"{f'did you mean {near[0]!r}? ' if near else ''}possible: {', '.join(NAMES)}")
    at = NAMES.index(before)
    _set(*KERNELS[:at], kernel, *KERNELS[at:])
    facts = kernel.align, kernel.group_align, before, [(option, value) for option, value, _ in kernel.variants]
    extension.add(_KIND, kernel.name, facts, kernel.supports, kernel.lower, kernel.supports_pair, kernel.reads,
                  kernel.supports_kind, kernel.price, *(rewrite for _, _, rewrite in kernel.variants))
    return kernel


def unregister(name: str) -> None:
    """Forget a registered kernel. Raises ExtensionError where there is none of that name."""
    extension.remove(_KIND, name)
    _set(*(kernel for kernel in KERNELS if kernel.name != name))


def _set(*kernels: Kernel) -> None:
    global KERNELS, NAMES
    KERNELS, NAMES = kernels, tuple(kernel.name for kernel in kernels)


def disableable() -> tuple[str, ...]:
    """What ``disable_kernels`` takes: families, and single providers of ops."""
    return (*NAMES, *providers.names())


def choose(device: torch.device | Target, dtype: torch.dtype, operands: Operands, disabled: tuple[str, ...] = (),
           product: OpOverload = SCALED_MM) -> tuple[Kernel | None, dict[str, str]]:
    """The first kernel that takes every (quantiser, Hadamard size) of a product, and why others did not."""
    target = Target.of(device)
    if target.missing is not None:
        return None, dict.fromkeys(NAMES, target.missing)
    reasons: dict[str, str] = {}
    for kernel in KERNELS:
        reason = (f"disabled: disable_kernels names {kernel.name!r}" if kernel.name in disabled else
                  kernel.refuses(target, dtype, operands, product))
        if reason is None:
            return kernel, reasons
        reasons[kernel.name] = reason
    return None, reasons


def multiplies(gemm: Gemm | None, target: Target, dtype: torch.dtype) -> Kernel | None:
    """The kernel of a recipe's product of matrices, of a model in ``dtype``; None of one that is not quantised, or that
    no kernel takes."""
    if gemm is None or gemm.specs is None:
        return None
    (a, b), size = gemm.specs, 0 if gemm.rotation is None else gemm.rotation.n
    return choose(target, dtype, ((a, size), (b, size)))[0]


def answers(targets: Iterable[Target], gemms: Iterable[Gemm], disabled: tuple[str, ...] = (),
            at_once: bool = False) -> str:
    """Which kernels take which operands of these products on these devices: the key of a choice among them.

    ``at_once``: of what may have to be built first, what is foreseen (``providers.answers``).

    A kernel is asked for every quantiser, Hadamard size and dtype that :func:`choose` can come to ask it for. So
    whatever of this machine an answer rests on (a compiler, objects of a cache, versions, what the processor has) is in
    the key, by what it decides.
    """
    operands = sorted({(side.spec, n) for gemm in gemms for side in (gemm.a, gemm.b) if side.spec is not None
                       for n in _hadamards(gemm)}, key=str)
    found: list[tuple[str, ...]] = []
    for target in sorted(set(targets), key=str) if operands else ():
        found.append((str(target), target.missing or "", providers.answers(target, at_once)))
        for kernel in () if target.missing else KERNELS:
            if kernel.name not in disabled:
                found.append((kernel.name, *_answers(kernel, target, operands)))
    return repr(found)


def _answers(kernel: Kernel, target: Target, operands: Iterable[tuple[QuantSpec, int]]) -> Iterator[str]:
    """A word of 0 and 1 for each question that a kernel answers: no and yes."""
    for ask in filter(None, (kernel.supports, kernel.reads)):
        yield "".join("01"[ask(target, dtype, spec, n) is None] for spec, n in operands for dtype in QUANTIZED)
    yield "".join("01"[kernel.supports_kind(target, product) is None] for product in _CALLED)


def _hadamards(gemm: Gemm) -> set[int]:
    """Sizes of a Hadamard transform that a quantiser of the product can follow at once."""
    return {0, *(rotation.n for rotation in (gemm.rotation, gemm.outer) if rotation is not None)}


_PROBED = (
    ("nvfp4", "e2m1/16 e4m3 amax nearest"),
    ("fp8 a row", "e4m3/row fp32 amax nearest"),
    ("fp8 a tensor", "e4m3/tensor fp32 amax nearest"),
    ("fp8 a block", "e4m3/128 fp32 amax_pow2 nearest"),
    ("fp8 a tile", "e4m3/128x128 fp32 amax_pow2 nearest"),
    ("int8 a row", "int8/row fp32 amax nearest"),
)


def probe(device: torch.device | Target) -> list[tuple[str, str, str | None]]:
    """(format, kernel, None or the reason it cannot) for every format and kernel on a device, for bfloat16 models."""
    formats = [(f"mx {element.name}", QuantSpec(element=element.name, rule="ceil"), 32) for element in ELEMENTS.values()
               if element.emax is not None]
    formats += [(name, QuantSpec.parse(text), 0) for name, text in _PROBED]
    target = Target.of(device)
    return [(name, k.name, target.missing or k.supports(target, torch.bfloat16, spec, rotation) or _idle(k, target))
            for name, spec, rotation in formats for k in KERNELS]


def _idle(kernel: Kernel, target: Target) -> str | None:
    """Why a kernel multiplies nothing on a device, None where it does."""
    reasons = [kernel.supports_kind(target, product) for product in _CALLED]
    return None if None in reasons else reasons[-1]
