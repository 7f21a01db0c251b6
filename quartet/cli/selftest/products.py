"""The products that ``quartet selftest`` compares with the reference: each kernel family on each of its formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quartet.kernels import reference
from quartet.kernels.reference.formats.nvfp4 import tensor_scales
from quartet.kernels.spec import QuantSpec
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.lowering.targets.int8 import ops as int8_ops
from quartet.recipes import recipes

MXFP8 = QuantSpec("e4m3")
NVFP4, NVFP4_TILE, FP8, FP8_BLOCK, FP8_TILE, INT8_ROW, INT8 = map(QuantSpec.parse, (
    "e2m1/16 e4m3 amax nearest", "e2m1/16x16 e4m3 amax nearest", "e4m3/tensor fp32 amax nearest",
    "e4m3/128 fp32 amax_pow2 nearest", "e4m3/128x128 fp32 amax_pow2 nearest", "int8/row fp32 amax nearest",
    "int8/tensor fp32 amax nearest"))


def _default() -> QuantSpec:
    """The quantiser of the default recipe's forward."""
    forward = recipes()["quartet"].fprop
    assert forward is not None and forward.a.spec is not None
    return forward.a.spec


MXFP4 = _default()


@dataclass(frozen=True)
class Operand:
    """A quantised tensor: what :func:`quartet.kernels.reference.quantize` gives, and the amax that it had."""

    codes: Tensor
    scales: Tensor
    spec: QuantSpec
    amax: Tensor | None = None

    @staticmethod
    def of(x: Tensor, spec: QuantSpec) -> Operand:
        amax = reference.largest_magnitude(x) if spec.takes_amax else None
        codes, scales, _ = reference.quantize(x, spec, amax=amax)
        return Operand(codes, scales, spec, amax)

    @property
    def swizzled(self) -> Tensor:
        return torch.ops.quartet.swizzle_scales(self.scales, self.spec.block if self.spec.tile else 1)

    @property
    def turned(self) -> Tensor:
        """fp32 scales as cuBLASLt reads those of blocks and of tiles."""
        if self.spec.tile:
            return torch.nn.functional.pad(self.scales, (0, -self.scales.shape[1] % block_scaled_ops.STRIP))
        return self.scales.t().contiguous()


Multiply = Callable[[Operand, Operand], Tensor]


@dataclass(frozen=True)
class Product:
    """``A · Bᵀ`` in bf16 by one kernel family: its name in the registry, its operands, and how it is called."""

    kernel: str
    format: str
    a: QuantSpec
    b: QuantSpec
    multiply: Multiply
    rotation: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.format}"


def exact(a: Operand, b: Operand) -> Tensor:
    """The reference's product in fp32."""
    return reference.scaled_mm(a.codes, a.scales, b.codes, b.scales, a.spec, b.spec, torch.float32, a_amax=a.amax,
                               b_amax=b.amax)


def _alpha(a: Operand, b: Operand) -> Tensor | None:
    if a.amax is None or b.amax is None:
        return None
    return tensor_scales(a.amax, a.spec)[1] * tensor_scales(b.amax, b.spec)[1]


def _cutlass(kind: str, a: Operand, b: Operand) -> Tensor:
    return torch.ops.quartet.block_scaled_mm(a.codes, a.swizzled, b.codes, b.swizzled, kind, 1.0, torch.bfloat16,
                                             _alpha(a, b))


def _library(kind: str, a: Operand, b: Operand) -> Tensor:
    return torch.ops.quartet.library_scaled_mm(a.codes, a.swizzled, b.codes, b.swizzled, kind, kind, torch.bfloat16,
                                               _alpha(a, b))


def _library_blocks(a: Operand, b: Operand) -> Tensor:
    formats = ("128x128" if operand.spec.tile else "1x128" for operand in (a, b))
    return torch.ops.quartet.library_scaled_mm(a.codes, a.turned, b.codes, b.turned, *formats, torch.bfloat16)


def _dot_scaled(a: Operand, b: Operand) -> Tensor:
    from quartet.kernels.triton.gemm.scaled_gemm import gemm

    return gemm(a.codes, a.swizzled, b.codes, b.swizzled, 1.0, torch.bfloat16)


def _triton_fp8(a: Operand, b: Operand) -> Tensor:
    from quartet.kernels.triton.quantize.ops import fold

    (a_values, a_scales), (b_values, b_scales) = (fold(x.codes, x.scales, x.spec) for x in (a, b))
    return _scaled_mm(a_values, a_scales, b_values, b_scales)


def _cublaslt(a: Operand, b: Operand) -> Tensor:
    return _scaled_mm(a.codes, a.scales, b.codes, b.scales)


def _scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return torch.ops.aten._scaled_mm.default(a, b.t(), a_scales, b_scales.t(), None, None, torch.bfloat16, False)


def _integers(a: Operand, b: Operand) -> Tensor:
    return (int8_ops.INT_MM(a.codes, b.codes) * a.scales * b.scales.t()).to(torch.bfloat16)


PRODUCTS = (
    Product("cutlass", "MXFP4", MXFP4, MXFP4, partial(_cutlass, "mxf4"), 32),
    Product("cutlass", "NVFP4", NVFP4, NVFP4_TILE, partial(_cutlass, "nvf4")),
    Product("cutlass", "MXFP8", MXFP8, MXFP8, partial(_cutlass, "mxf8")),
    Product("scaled-mm", "NVFP4", NVFP4, NVFP4_TILE, partial(_library, "nvf4")),
    Product("scaled-mm", "MXFP8", MXFP8, MXFP8, partial(_library, "mxf8")),
    Product("scaled-mm", "FP8 blocks and tiles", FP8_BLOCK, FP8_TILE, _library_blocks),
    Product("scaled-mm", "FP8 blocks", FP8_BLOCK, FP8_BLOCK, _library_blocks),
    Product("dot-scaled", "MXFP4", MXFP4, MXFP4, _dot_scaled, 32),
    Product("triton-fp8", "MXFP4", MXFP4, MXFP4, _triton_fp8, 32),
    Product("cublaslt", "FP8", FP8, FP8, _cublaslt),
    Product("int-mm", "INT8", INT8_ROW, INT8, _integers),
)
