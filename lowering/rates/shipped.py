"""Constants that come with the package: fits over products and passes of sizes from 1024 to 16384 on one H200 (torch
2.11.0+cu130), products under two seconds of nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from quartet.lowering.rates.constants import HOST, SHIPPED, Rates

RATES: Mapping[str, Rates] = {  # by the names of quartet.runtime.gpus
    "h200": Rates(
        "NVIDIA H200",
        flops={"bf16": 6.78e14, "fp8": 1.345e15},  # under sustained load; 8.26e14 and 1.63e15 in bursts
        output={"bf16": 2.6e-13, "fp8": 2.27e-13},
        passes={"rows": 1.1e-12, "both axes": 1.97e-12, "one axis": 1.34e-12, "requantise": 1.1e-12, "fold": 3.8e-13,
                "unrotate": 9.96e-13, "amax": 8.06e-13, "cast": 9.58e-13, "copy": 9.6e-13},
        launch=5.4e-6, host=HOST, origin=SHIPPED),
}
