"""Measure every configuration of the table on the device for one product, and let ``gemm`` use the fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from quartet.kernels.build_cache import BuildError
from quartet.kernels.cutlass.configuration import BLOCK, ELEMENT_BITS, Configuration
from quartet.kernels.cutlass.gemm import gemm, product_of
from quartet.kernels.cutlass.library import KernelError
from quartet.kernels.cutlass.selection import is_settled, remember
from quartet.kernels.reference.formats.packing import swizzled_size

log = logging.getLogger(__name__)

WARM_UPS, REPEATS = 3, 25
LEAST_FLUSHED = 1 << 28  # bytes: to write them takes longer than to launch a product
_ONE = {"mxf4": 127, "nvf4": 0x38, "mxf8": 127}  # the scale 1 as a byte
_given_up: set[tuple[torch.device, str]] = set()


def tune(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor | None = None, *, kind: str,
         dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None, c: Tensor | None = None,
         replace: bool = True) -> dict[Configuration, float]:
    """Microseconds of each configuration for these operands, fastest first; ``gemm`` takes that one from now on, in
    this process and in later ones, for products of the same shape class.

    Builds the kernels that are missing, which takes minutes, and waits for the device. What cannot be built or run is
    left out, with a warning. Arguments are those of ``gemm``.

    Args:
        replace: what was measured before; else that stays.
    Raises:
        BuildError: no configuration could be built and run, or others can write to the cache folder. OSError: this user
            cannot. ValueError: as ``gemm``.
    """
    product = product_of(a, b, kind, dtype, bias is not None, c is not None)
    out = torch.empty(product.m, product.n, dtype=dtype, device=a.device)
    run = partial(gemm, a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype, bias=bias, c=c, out=out)
    times: dict[Configuration, float] = {}
    for configuration in product.configurations():
        try:
            times[configuration] = microseconds(partial(run, configuration=configuration), a.device)
        except (BuildError, KernelError) as error:
            log.warning("%s is left out of the measurement: %s", configuration.name, error)
    if not times:
        raise BuildError(f"no kernel for {product.shape_class} on {product.arch} could be measured; see the warnings")
    ranked = dict(sorted(times.items(), key=lambda item: item[1]))
    remember(product, a.device, ranked, replace)
    log.info("%s: %s", product.shape_class, ", ".join(f"{c.tile_name} {time:.1f} µs" for c, time in ranked.items()))
    return ranked


def tune_once(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor | None, *, kind: str,
              dtype: torch.dtype) -> None:
    """:func:`tune`, at the first call of a shape class: not where it is measured already or named by the user, nor
    while a CUDA graph is captured. Without memory for it, or kernels, or a place to keep what it finds, the rule's
    choice stays, with a warning."""
    product = product_of(a, b, kind, dtype)
    if 0 in (product.m, product.n, product.k) or is_settled(product, a.device):
        return
    key = a.device, product.shape_class
    if key in _given_up or torch.cuda.is_current_stream_capturing():
        return
    try:
        tune(a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype, replace=False)
    except (BuildError, OSError, torch.OutOfMemoryError) as error:
        _given_up.add(key)
        log.warning("%s is not tuned: %s", product.shape_class, error)


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of ``run`` on a GPU between events of its stream, with nothing of it in the L2 cache.

    Before each run a buffer several times as large as that cache is written, long enough for the launch to be enqueued
    meanwhile, so that the time is that of the device alone.
    """
    with torch.cuda.device(device):
        size = max(LEAST_FLUSHED, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        flushed = torch.empty(size, dtype=torch.uint8, device=device)
        for _ in range(WARM_UPS):
            run()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
        for begin, end in events:
            flushed.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.current_stream(device).synchronize()
        return 1000 * median(begin.elapsed_time(end) for begin, end in events)


def random_operand(kind: str, rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes of a matrix ``[rows, k]`` and swizzled scales that are all 1."""
    if ELEMENT_BITS[kind] == 4:
        codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device=device)
    else:
        codes = torch.randn(rows, k, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
    return codes, torch.full((swizzled_size(rows, k // BLOCK[kind]),), _ONE[kind], dtype=torch.uint8, device=device)
