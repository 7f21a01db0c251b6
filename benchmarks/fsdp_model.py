"""Step time of FSDP2 on paper, 8 to 1024 GPUs: from which size on a packed all-gather pays.

    python benchmarks/fsdp_model.py --tokens 4096,16384
    python benchmarks/fsdp_model.py --node 2 --gpus 2 --nvlink 150          # beside a measurement on two GPUs

A block of P parameters computes for c_f seconds forward and c_b = 2·c_f backward. Its gather moves G = b·P bytes, b of
BF16 2, of FP8 1.01, of MXFP4 0.532, and its reduce-scatter R = 2·P. In nodes of n GPUs, N in all, a collective of B
bytes takes

    t(B) = max(B·(n − 1)/n / nvlink, B·(1 − n/N) / (n·network)) + hop·(N/n − 1) + launch

where all n network cards of a node work at once. FSDP2 gathers the next block while one computes, and reduces the last
one meanwhile; both wait for the same links:

    step = t(G) + L·max(c_f, t(G)) + L·max(c_b, a·t(G) + t(R)) + t(R)       a = 1 resharded after forward, 0 kept

Compute times are our measured steps (docs/performance.md, one H200, 16384 tokens) divided by layers and tokens. Not in
it: head, embedding, optimizer, contention of the two collectives for multiprocessors, stragglers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpu_common import names, say, table

BYTES = {"bf16": 2.0, "fp8": 2.0, "fp8+packed": 1.01, "quartet": 2.0, "quartet+packed": 0.532}  # a gathered parameter
PAYS = 0.02  # of the step


@dataclass(frozen=True)
class Model:
    """Parameters of a block, how many there are, and microseconds that a token takes in one: forward and backward."""

    parameters: float
    layers: int
    microseconds: dict[str, float]


MODELS = {
    "1b": Model(67.1e6, 16, {"bf16": 0.790, "fp8": 0.620, "quartet": 0.650}),
    "8b": Model(243.3e6, 32, {"bf16": 2.652, "fp8": 1.801, "quartet": 1.877}),
}
MODELS["70b"] = Model(855.6e6, 80, {k: v * 855.6 / 243.3 for k, v in MODELS["8b"].microseconds.items()})  # not measured


@dataclass(frozen=True)
class Links:
    """GB/s of a GPU to its node and of its network card, GPUs of a node, µs of a hop and of a launch."""

    nvlink: float
    network: float
    node: int
    hop: float
    launch: float

    def seconds(self, size: float, gpus: int) -> float:
        """Of a gather or a reduce-scatter of so many bytes in all."""
        n = min(self.node, gpus)
        inside = size * (n - 1) / n / (self.nvlink * 1e9)
        between = size * (1 - n / gpus) / (n * self.network * 1e9)
        return max(inside, between) + 1e-6 * (self.hop * (gpus / n - 1) + self.launch)


def step(model: Model, column: str, tokens: int, gpus: int, links: Links, reshard: bool) -> float:
    """Seconds."""
    compute = 1e-6 * model.microseconds[column.partition("+")[0]] * tokens
    gather = links.seconds(BYTES[column] * model.parameters, gpus)
    reduce = links.seconds(2 * model.parameters, gpus)
    forward, backward = max(compute / 3, gather), max(2 * compute / 3, reshard * gather + reduce)
    return gather + model.layers * (forward + backward) + reduce


def rows(name: str, tokens: int, sizes: list[int], links: Links, reshard: bool) -> list[tuple[str, ...]]:
    """One row a number of GPUs: milliseconds of BF16, and speed of the others."""
    found = []
    for gpus in sizes:
        times = {column: step(MODELS[name], column, tokens, gpus, links, reshard) for column in BYTES}
        found.append((f"{name}, {tokens} tokens, {gpus} GPUs", f"{1e3 * times['bf16']:.0f}",
                      *(f"{times['bf16'] / times[c]:.2f}" for c in list(BYTES)[1:]),
                      *(f"{times[c] / times[c + '+packed'] - 1:+.1%}" for c in ("fp8", "quartet"))))
    return found


def pays_from(name: str, column: str, tokens: int, sizes: list[int], links: Links, reshard: bool) -> int | None:
    """The fewest GPUs from which on a packed gather shortens the step by 2 %; None if at none of the sizes."""
    for gpus in sizes:
        whole, packed = (step(MODELS[name], c, tokens, gpus, links, reshard) for c in (column, column + "+packed"))
        if whole / packed - 1 >= PAYS:
            return gpus
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names, default=list(MODELS))
    parser.add_argument("--tokens", type=names, default=["2048", "4096", "8192", "16384"], help="of a GPU and step")
    parser.add_argument("--gpus", type=names, default=["8", "16", "64", "256", "1024"])
    parser.add_argument("--keep", action="store_true", help="weights stay unsharded between forward and backward")
    parser.add_argument("--nvlink", type=float, default=360, help="GB/s, default %(default)s: 0.8 of NVLink 4")
    parser.add_argument("--network", type=float, default=45, help="GB/s a GPU, default %(default)s: 0.9 of 400 Gb/s")
    parser.add_argument("--node", type=int, default=8)
    parser.add_argument("--hop", type=float, default=3, help="µs, default %(default)s")
    parser.add_argument("--launch", type=float, default=20, help="µs, default %(default)s")
    args = parser.parse_args()
    links = Links(args.nvlink, args.network, args.node, args.hop, args.launch)
    sizes, counts = [int(n) for n in args.gpus], [int(n) for n in args.tokens]
    shown: list[tuple[str, ...]] = [("", "BF16 ms", *list(BYTES)[1:], "packed fp8", "packed quartet")]
    for name in args.models:
        for tokens in counts:
            shown += rows(name, tokens, sizes, links, not args.keep)
    say(table(shown))
    for name in args.models:
        for column in ("fp8", "quartet"):
            each = {tokens: pays_from(name, column, tokens, sizes, links, not args.keep) for tokens in counts}
            found = ", ".join(f"{gpus} GPUs on at {tokens} tokens" if gpus else f"no size at {tokens} tokens"
                              for tokens, gpus in each.items())
            say(f"{name} {column}, packed, is {PAYS:.0%} faster from {found}")


if __name__ == "__main__":
    main()
