"""The specification of the numbers, in plain PyTorch. Every kernel is tested against it bit for bit."""

from quartet.kernels.reference.formats.elements import (
    E2M1_VALUES,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_reciprocal,
    fp8_encode,
)
from quartet.kernels.reference.formats.packing import (
    pack_bits,
    pack_nibbles,
    swizzle_scales,
    swizzled_offset,
    swizzled_size,
    unpack_bits,
    unpack_nibbles,
    unswizzle_scales,
)
from quartet.kernels.reference.formats.scales import e8m0_scale, fp32_scale, scale_of_amax, tree_sum
from quartet.kernels.reference.hadamard import hadamard, pad_last
from quartet.kernels.reference.philox import Draw, philox4x32, random_bits, random_signs, sign_table
from quartet.kernels.reference.products.linear import QuartetLinear, linear_backward, linear_forward
from quartet.kernels.reference.quantize import (
    apply_mask,
    dequantize,
    largest_magnitude,
    quantize,
    random_shape,
    scaled_bmm,
    scaled_mm,
)

__all__ = [
    "Draw", "E2M1_VALUES", "QuartetLinear", "apply_mask", "dequantize", "e2m1_decode", "e2m1_encode", "e8m0_decode",
    "e8m0_reciprocal", "e8m0_scale", "fp32_scale", "fp8_encode", "hadamard", "largest_magnitude", "linear_backward",
    "linear_forward", "pack_bits", "pack_nibbles", "pad_last", "philox4x32", "quantize", "random_bits", "random_shape",
    "random_signs", "scale_of_amax", "scaled_bmm", "scaled_mm", "sign_table", "swizzle_scales", "swizzled_offset",
    "swizzled_size", "tree_sum", "unpack_bits", "unpack_nibbles", "unswizzle_scales",
]
