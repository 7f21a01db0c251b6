"""The quantised IR: semantic ops whose implementation is the reference.

``torch.ops.quartet.*`` run on any device as plain PyTorch; that implementation is also their oracle
and their fallback. Specs travel as strings (``str(QuantSpec)``), so a printed graph reads like the
recipe. Every op is functional and a pure function of its arguments.

    signs(seed, site, n)                  [n] float32 ±1
    random_bits(seed, site, rows, cols)   int16 0…511, what a stochastic quantize draws
    fixed_signs(signs, device)            [n] float32, given
    hadamard(x, n, signs, inverse, dtype) [R, C] → [R, ⌈C/n⌉n]
    amax(x)                               [R, C] → [1, 1] float32, the largest magnitude
    quantize(x, spec, seed, site, amax)   [R, C] → codes, scales, mask   (C padded to the block, where there are blocks)
    dequantize(codes, scales, spec, dtype, amax)  → [R, padded]
    apply_mask(x, mask)                   [R, C], packed bits [R, C/8]
    scaled_mm(a, a_scales, b, b_scales, a_spec, b_spec, dtype, a_amax, b_amax)   [M, K] · [N, K]ᵀ
    scaled_bmm(…, dtype, batch, a_amax, b_amax)   [batch·M, K] and [batch·N, K] → [batch·M, N]

The codes that a product reads are those of a quantize or, where one scale is the whole tensor's, their transpose.
``amax`` is given where the spec takes one (``QuantSpec.takes_amax``), else it is None.
"""

from quartet.lowering.ir.layout import FLOAT8, ceil_to, code_layout, scale_layout
from quartet.lowering.ir.ops.core import (
    AMAX,
    APPLY_MASK,
    DEQUANTIZE,
    FIXED_SIGNS,
    HADAMARD,
    PRODUCTS,
    QUANTIZE,
    SCALED_BMM,
    SCALED_MM,
    SIGN_TABLE,
    SIGNS,
)
from quartet.lowering.ir.ops.decompositions import STORE, Three, store

__all__ = ["AMAX", "APPLY_MASK", "DEQUANTIZE", "FIXED_SIGNS", "FLOAT8", "HADAMARD", "PRODUCTS", "QUANTIZE",
           "SCALED_BMM", "SCALED_MM", "SIGN_TABLE", "SIGNS", "STORE", "Three", "ceil_to", "code_layout", "scale_layout",
           "store"]
