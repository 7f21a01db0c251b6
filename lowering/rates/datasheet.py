"""Constants of a GPU that nobody has measured, from its data sheet and what an H200 reaches of its own.

    products   share · operations a second of the data sheet
    passes     the H200's · its bytes a second / the GPU's; of quantisers, which are limited by the instructions that
               start, at least its instructions a second / the GPU's; beside Hopper those of the Triton kernels

An H200 keeps up 0.69 of its bf16 and 0.68 of its FP8 operations. Nobody has measured integer products and those of FP4
under such a load: half is taken.
"""

from __future__ import annotations

from quartet.lowering.rates import shipped
from quartet.lowering.rates.constants import DATA_SHEET, ESTIMATE, HOST, PASSES, Rates
from quartet.runtime import gpus
from quartet.runtime.gpus import Gpu

SHARE = {"bf16": 0.68, "fp8": 0.68, "int8": 0.5, "fp4": 0.5}
RESULT_BYTES = {"bf16": 2, "fp8": 2, "int8": 4, "fp4": 2}
BY_INSTRUCTIONS = ("rows", "both axes", "one axis", "requantise")


def rates(gpu: Gpu) -> Rates:
    """Constants of a GPU, marked as what they are."""
    known, reference = shipped.RATES["h200"], gpus.named("h200")
    assert reference is not None
    by_bytes = reference.bandwidth / gpu.bandwidth
    by_instructions = reference.processors * reference.clock / (gpu.processors * gpu.clock)
    alike = gpu.capability == reference.capability
    passes = known.passes if alike else {**known.passes, **shipped.PORTABLE}
    slower = {name: max(by_bytes, by_instructions) if name in BY_INSTRUCTIONS else by_bytes for name in PASSES}
    return Rates(
        gpu.name,
        flops={dtype: share * gpu.operations(dtype) for dtype, share in SHARE.items() if gpu.operations(dtype)},
        output={dtype: known.output["bf16"] * by_bytes * size / 2 for dtype, size in RESULT_BYTES.items()},
        passes={name: passes[name] * factor for name, factor in slower.items()},
        launch=known.launch, host=HOST, origin=ESTIMATE if gpu.estimated else DATA_SHEET,
        portable=known.portable if alike else {})
