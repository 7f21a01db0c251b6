"""Constants that come with the package, of one H200 (torch 2.11.0+cu130): products fitted over sizes from 1024 to 16384
under two seconds of nothing else, passes as ``quartet calibrate`` times them."""

from __future__ import annotations

from collections.abc import Mapping

from quartet.lowering.rates.constants import HOST, SHIPPED, Rates

PORTABLE: Mapping[str, float] = {"both axes": 2.13e-12, "requantise": 1.3e-12}
"""Passes of the H200 by the Triton kernels, which other GPUs run; on Hopper quartet's are kernels of its own."""
_PASSES = {"rows": 9.44e-13, "both axes": 1.18e-12, "one axis": 1.32e-12, "requantise": 6.75e-13, "fold": 3.8e-13,
           "unrotate": 1.02e-12, "amax": 5.64e-13, "cast": 1.02e-12, "copy": 9.07e-13}
RATES: Mapping[str, Rates] = {  # by the names of quartet.runtime.gpus
    "h200": Rates(
        "NVIDIA H200",
        flops={"bf16": 6.78e14, "fp8": 1.345e15},  # under sustained load; 8.26e14 and 1.63e15 in bursts
        output={"bf16": 2.6e-13, "fp8": 2.27e-13},
        passes=_PASSES, launch=5.4e-6, host=HOST, origin=SHIPPED,
        portable={name: taken / _PASSES[name] for name, taken in PORTABLE.items()}),
}
