"""Measure every configuration of the table on the device for one product, and let ``gemm`` use the fastest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quartet.kernels.cutlass.configuration import Configuration, table
from quartet.kernels.cutlass.gemm import OUTPUT_OF, TUNED, gemm, operands

WARM_UPS, REPEATS = 3, 20


def tune(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor | None = None, *, kind: str,
         dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None, c: Tensor | None = None,
         ) -> dict[Configuration, float]:
    """Microseconds of each configuration for these operands, fastest first; ``gemm`` takes that one from now on.

    Builds the kernels that are missing, which takes minutes, and waits for the device. Arguments and errors are those
    of ``gemm``.
    """
    arch, m, n, k = operands(a, b, kind)
    output = OUTPUT_OF[dtype]
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    run = partial(gemm, a, a_scales, b, b_scales, alpha, kind=kind, dtype=dtype, bias=bias, c=c, out=out)
    times = {configuration: _microseconds(partial(run, configuration=configuration))
             for configuration in table([arch], [kind], output, bias is not None, c is not None)}
    ranked = dict(sorted(times.items(), key=lambda item: item[1]))
    TUNED[arch, kind, output, bias is not None, c is not None, m, n, k] = next(iter(ranked))
    return ranked


def _microseconds(run: Callable[[], Tensor]) -> float:
    """Mean time of a product on the device, launches included where they are not hidden."""
    for _ in range(WARM_UPS):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / REPEATS
