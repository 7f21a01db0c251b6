"""What launching costs the host: a chain of the quantisers' ops, and a training step of a Llama too small for its GPU.

    python benchmarks/bench_launch.py                                 # both, and BF16 beside the step
    QUARTET_LAUNCHER=python python benchmarks/bench_launch.py         # the same with every op in Python

The chain: microseconds of host time a launch, eager and compiled, over enough calls that the driver's queue does not
fill. The step: ``transformers``' Llama with few tokens, compiled, forward to optimizer; launches a step are counted by
``torch.profiler``, host time is that of a step whose end is not waited for, kept short enough for the queue.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from quartet.lowering.ir.op import ops
from quartet.runtime.replay.library import LAUNCHER

SPEC, ROUNDED = "e2m1/32 e8m0 quest(rms,nearest) nearest mask", "e2m1/32 e8m0 even stochastic"
NONE = (None, None, None)  # as in a graph: by position


def host_seconds(run: Callable[[], object], repeats: int, calls: int = 1) -> float:
    """Median host time of ``run``, the GPU idle before each measurement."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


def launches(run: Callable[[], object]) -> int:
    """Kernels that one ``run`` launches. What is launched after the profiler has run takes the host longer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" and "Mem" not in event.name for event in profiler.events())


def chain(links: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]:
    """``links`` times quantise, fold and unrotate."""
    quantize, fold, unrotate = (getattr(torch.ops.quartet, name).default
                                for name in ("cuda_quantize", "cuda_fold", "unrotate"))

    def run(x: torch.Tensor, signs: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
        made = []
        for site in range(links):
            codes, scales, mask, _, _ = quantize(x, 32, signs, SPEC, None, site, None, True, False, *NONE)
            values, _ = fold(codes, scales, SPEC)
            _, _, _, grad, _ = quantize(x, 32, signs, ROUNDED, seed, site, None, False, True, *NONE)
            x = unrotate(x, mask, 32, signs, 1.0, x.shape[1], x.dtype)
            made += [values, grad]
        return [x, *made]

    return run


def time_chain(links: int) -> None:
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        floor = host_seconds(lambda: torch.ops.aten.neg.default(x), 40, 100)
    print(f"aten.neg, eager: {floor * 1e6:.1f} µs of host time")
    signs, seed = torch.ones(32, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    run = chain(links)
    for name, form in (("eager", run), ("compiled", torch.compile(run, fullgraph=True))):
        with torch.no_grad():
            for _ in range(5):
                form(x, signs, seed)
            seconds, count = host_seconds(lambda form=form: form(x, signs, seed), 40), 4 * links
        print(f"chain, {name}: {count} launches, {seconds * 1e6 / count:.1f} µs of host time each")


def time_step(policies: list[str | None], layers: int, tokens: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    timed = []
    for policy in policies:
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
                             num_key_value_heads=4, vocab_size=2048, use_cache=False)
        model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
        how = {} if policy is None else {"backend": "quartet", "options": {"policy": policy}}
        compiled = torch.compile(model, **how)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(2048, (1, tokens), device="cuda")

        def step(compiled: Any = compiled, optimizer: torch.optim.Optimizer = optimizer,
                 ids: torch.Tensor = ids) -> None:
            compiled(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(6):
            step()
        before = {op.name: LAUNCHER.counts(op.name) for op in ops()}
        seconds = host_seconds(step, 30)
        in_python = {name: LAUNCHER.counts(name).runs - known.runs for name, known in before.items()}
        timed.append((policy or "BF16", seconds, step, {name: n for name, n in in_python.items() if n}))
    _, least, step, _ = timed[0]
    fewest = launches(step)
    for policy, seconds, step, in_python in timed:
        count = launches(step)
        more = (f", {(seconds - least) * 1e6 / (count - fewest):.1f} µs for each launch more than BF16's"
                if count > fewest else "")
        print(f"step, {policy}: {count} launches ({count / fewest:.2f}×), host {seconds * 1e3:.2f} ms "
              f"({seconds / least:.2f}×), {seconds * 1e6 / count:.1f} µs a launch{more}; calls in Python while "
              f"measured: {in_python or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=["fp8", "quartet"])
    parser.add_argument("--links", type=int, default=25)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    chosen = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    time_chain(chosen.links)
    if chosen.policies:
        time_step([None, *chosen.policies], chosen.layers, chosen.tokens)
    print(f"launcher: {LAUNCHER.status()}")


if __name__ == "__main__":
    main()
