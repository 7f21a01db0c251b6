"""The fused CPU kernels against a copy of the same tensor and against ``torch.compile`` of the reference chain.

    OMP_NUM_THREADS=1 python benchmarks/bench_cpu_kernels.py [--no-compile] [--repeat 30]

All candidates are timed in one run, interleaved, and the median and the fastest are printed: nanoseconds an
element (wall clock × threads would be core time), and GB/s of what has to be read and written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from quartet.kernels import reference as ref
from quartet.kernels.cpu import ops
from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.spec import QuantSpec

FORWARD, QUEST = QuantSpec(rule="even"), QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True)
BACKWARD = QuantSpec(rule="headroom", rounding="stochastic")
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
GAIN = 16 / 9
Case = tuple[Callable[[], object], Callable[[], object] | None, int]


def cases(rows: int, cols: int) -> dict[str, Case]:
    """name → (kernel, the reference chain of it, bytes moved)."""
    x, across = torch.randn(rows, cols), torch.randn(cols, rows).t()
    half = x.bfloat16()
    fixed, signs = torch.tensor(FLAT_SIGNS, dtype=torch.float32), ref.random_signs(SEED, 0, 32)
    codes, scales, _ = ref.quantize(ref.hadamard(x, 32, fixed), FORWARD)
    mask = ref.quantize(ref.hadamard(x, 32), QUEST)[2]
    n = rows * cols
    packed, masked = n // 2 + n // 32, n // 8

    def fused(source, spec, pack, values):
        before = {FORWARD: fixed, QUEST: None, BACKWARD: signs}[spec]
        return lambda: ops.rotate_quantize(source, rotation=32, signs=before, spec=spec, seed=SEED, site=0, packed=pack,
                                           values=values)

    def requantize(transpose):
        return lambda: ops.requantize(codes, scales, FORWARD, transpose=transpose, rotation=32, signs=signs,
                                      spec=BACKWARD, seed=SEED, site=0, packed=False, values=torch.float32)

    def values_of(source, seed):
        packed, scales, _ = ref.quantize(ref.hadamard(source, 32, signs), BACKWARD, seed)
        return ref.dequantize(packed, scales, QuantSpec(rule="floor"))

    def forward(source):
        return ref.quantize(ref.hadamard(source, 32, fixed), FORWARD)

    def requantized(codes, scales, seed):
        return values_of(ref.dequantize(codes, scales, FORWARD).t(), seed)

    def unrotate(mask, signs):
        return lambda: ops.mask_rotate(x, mask, rotation=32, signs=signs, gain=GAIN, cols=cols, dtype=torch.float32)

    def gradient(source):
        return ref.hadamard(source * GAIN, 32, fixed, inverse=True)

    def dequantized(codes, scales):
        return ref.dequantize(codes, scales, FORWARD)

    return {
        "copy float32": (x.clone, None, 8 * n),
        "copy bfloat16": (half.clone, None, 4 * n),
        "signed H32, even, packed": (fused(x, FORWARD, True, None), lambda: forward(x), 4 * n + packed),
        "  and values": (fused(x, FORWARD, True, torch.float32), None, 8 * n + packed),
        "  bfloat16, packed": (fused(half, FORWARD, True, None), None, 2 * n + packed),
        "H32 quest nearest, packed": (fused(x, QUEST, True, None), None, 4 * n + packed + masked),
        "H32 stochastic, packed": (fused(x, BACKWARD, True, None), None, 4 * n + packed),
        "H32 stochastic, values": (fused(x, BACKWARD, False, torch.float32), lambda: values_of(x, SEED), 8 * n),
        "  of a transposed view": (fused(across, BACKWARD, False, torch.float32), lambda: values_of(across, SEED),
                                  8 * n),
        "requantize": (requantize(False), None, packed + 4 * n),
        "requantize transposed": (requantize(True), lambda: requantized(codes, scales, SEED), packed + 4 * n),
        "dequantize float32": (lambda: ops.dequantize(codes, scales, FORWARD), lambda: dequantized(codes, scales),
                               packed + 4 * n),
        "dequantize bfloat16": (lambda: ops.dequantize(codes, scales, FORWARD, torch.bfloat16), None, packed + 2 * n),
        "inverse signed H32": (unrotate(None, fixed), lambda: gradient(x), 8 * n),
        "mask, inverse H32": (unrotate(mask, None), None, 8 * n + masked),
    }


def timed(functions: list[Callable[[], object]], repeat: int) -> list[list[float]]:
    """Seconds of every call, the candidates taking turns."""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeat):
        for function, record in zip(functions, seconds, strict=True):
            begin = time.perf_counter()
            function()
            record.append(time.perf_counter() - begin)
    return seconds


def compiled(chain: Callable[[], object]) -> Callable[[], object]:
    torch._dynamo.reset()
    return torch.compile(chain, dynamic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    options = parser.parse_args()
    reason = ops.unavailable()
    if reason:
        raise SystemExit(reason)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median (fastest) of {options.repeat}")
    for rows, cols in ((1024, 1536), (1536, 512)):
        table = cases(rows, cols)
        names = list(table)
        functions = [kernel for kernel, _, _ in table.values()]
        peers = [] if options.no_compile else [name for name in names if table[name][1] is not None]
        seconds = timed(functions + [compiled(table[name][1]) for name in peers], options.repeat)
        peer_seconds = dict(zip(peers, seconds[len(names):], strict=True))
        print(f"\n{rows} x {cols:<18} {'ns/element':>18} {'GB/s':>7} {'torch.compile ns/element':>28} {'ratio':>6}")
        for name, record in zip(names, seconds, strict=False):
            median = statistics.median(record)
            nanoseconds = 1e9 / (rows * cols)
            line = (f"{name:<26} {median * nanoseconds:10.2f} ({min(record) * nanoseconds:.2f}) "
                    f"{table[name][2] / median / 1e9:7.1f}")
            if name in peer_seconds:
                peer = statistics.median(peer_seconds[name])
                line += f" {peer * nanoseconds:28.2f} {peer / median:6.1f}"
            print(line)


if __name__ == "__main__":
    main()
