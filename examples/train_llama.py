"""Train a small Llama on text with ``torch.compile(backend="quartet")``, beside plain Inductor.

    python examples/train_llama.py --out demo-out
    python examples/train_llama.py --size demo --policy quartet-paper --steps 200 --no-compare

Both runs start from the same weights and see the same bytes in the same order; with ``--seeds 3`` the quantised one
runs three times, which differ by how gradients were rounded. At the end: the validation losses, what happened to each
matmul, the bytes kept for backward, and in ``--out`` the loss curves, the graphs and a JSON file. On a GPU, where there
is one, the model is of a size at which the gain shows.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on CUDA

import torch
from console import BarColumn, Console, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from corpus import Corpus, read_corpus
from descent import adamw, descend, learning_rate
from llama import PRESETS, Llama, LlamaConfig
from measure import saved_for_backward, stored_bytes
from outcome import AGAIN, NO_PLOT, median, plot, pyplot, save, show
from output import as_path, check_folder, whole, write_text
from predicted import predictions, told
from torch import Tensor

import quartet

BASELINE = "inductor"
SIMULATION = ("on a CPU low precision is a simulation: losses and bytes are real, times are not those of a GPU, of "
              "which a prediction follows at the end")
VALIDATION_BATCHES = 64


@dataclass
class Run:
    """One model in training: what it learned and how long it took."""

    name: str
    model: Llama
    compiled: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_step: float = math.nan
    validation: float = math.nan
    saved_bytes: int = 0

    def step(self, tokens: Tensor, targets: Tensor, lr: float) -> float:
        """One update; the loss in nats a byte. The first call compiles, and is timed apart."""
        start = time.perf_counter()
        loss = self.compiled(tokens, targets)
        descend(self.model, self.optimizer, loss, lr)
        self.losses.append(loss.item())
        elapsed = time.perf_counter() - start
        if math.isnan(self.first_step):
            self.first_step = elapsed
        else:
            self.seconds.append(elapsed)
        return self.losses[-1]

    def validate(self, corpus: Corpus, args: argparse.Namespace) -> None:
        """Mean loss over fixed batches, through the compiled training graph: the forward is the trained one,
        quantisation included, and nothing is compiled again."""
        losses = []
        for i in range(VALIDATION_BATCHES):
            losses.append(self.compiled(*on_device(corpus, "validation", args, i)).item())
        self.validation = sum(losses) / len(losses)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's states, their scales and steps included."""
        return stored_bytes(self.optimizer.state)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "quartet": quartet.state_dict(self.model), "losses": self.losses}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        quartet.load_state_dict(self.model, state["quartet"])
        self.losses = list(state["losses"])


def on_device(corpus: Corpus, split: str, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    tokens, targets = corpus.batch(split, args.seed, step, args.batch, args.seq)
    return tokens.to(args.device), targets.to(args.device)


def sizes(args: argparse.Namespace) -> LlamaConfig:
    config = PRESETS[args.size]
    if args.dim:
        config = replace(config, dim=args.dim, heads=max(1, args.dim // 64), ffn=3 * args.dim)
    return replace(config, layers=args.layers) if args.layers else config


def make_runs(args: argparse.Namespace, config: LlamaConfig) -> list[Run]:
    """The run in low precision and, to compare, the same weights under plain Inductor."""
    model = Llama(config, args.seq).to(args.device, torch.bfloat16 if args.device.startswith("cuda") else None)
    twin = copy.deepcopy(model)
    inductor = dict(torch._inductor.list_mode_options(args.compile_mode)) if args.compile_mode else {}
    options = {**inductor, **quartet_options(args), "dump": str(args.out / "graphs")}
    compiled = torch.compile(model, backend=args.backend, options=options if args.backend == "quartet" else None)
    runs = [Run(args.backend, model, compiled, adamw(model, args.lr))]
    if args.compare:
        runs.append(Run(BASELINE, twin, torch.compile(twin, mode=args.compile_mode), adamw(twin, args.lr)))
    for i in range(2, args.seeds + 1):
        other = copy.deepcopy(model)
        compiled = torch.compile(other, backend=args.backend, options={**inductor, **quartet_options(args)})
        runs.append(Run(f"{args.backend}{AGAIN}{i}", other, compiled, adamw(other, args.lr)))
    return runs


def quartet_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"policy": args.policy} if args.policy else {}


def save_checkpoint(path: Path, step: int, runs: list[Run], described: dict[str, Any]) -> None:
    """Everything that the next step depends on, written whole or not at all."""
    state = {"step": step, "described": described, "rng": torch.get_rng_state(),
             "runs": {run.name: run.state() for run in runs}}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    path = path.with_name(path.name.replace("{step}", str(step)))
    with whole(path) as partial:
        torch.save(state, partial)


def load_checkpoint(path: Path, runs: list[Run], described: dict[str, Any]) -> int:
    """Restore the runs and the random generators; the number of steps already done.

    Raises:
        ValueError: no checkpoint, or one of a run with other settings, or that lacks one of the runs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whichever kind: the unpickler follows the bytes that are there
        raise ValueError(f"{path} is no checkpoint: torch.load cannot read it ({type(error).__name__})") from error
    if not (isinstance(state, dict) and {"step", "described", "rng", "runs"} <= state.keys()):
        raise ValueError(f"{path} is no checkpoint of this program; resume one that --checkpoint wrote")
    other = [f"{k} {state['described'].get(k)!r} there, {v!r} here" for k, v in described.items()
             if state["described"].get(k) != v]
    if other:
        raise ValueError(f"{path} continues another run: {'; '.join(other)}; resume with the settings it was made with")
    for run in runs:
        if run.name not in state["runs"]:
            raise ValueError(f"{path} holds no run {run.name!r}, only {', '.join(state['runs'])}; "
                             "make it with --compare, or resume with --no-compare")
        run.load(state["runs"][run.name])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return int(state["step"])


def standing(run: Run, tokens: int) -> str:
    """Loss and speed of a run for the progress bar."""
    speed = f" {tokens / median(run.seconds[-20:]):.0f} tokens/s" if run.seconds else ""
    return f"{run.name} {run.losses[-1]:.3f} nats/byte{speed}"


def train(runs: list[Run], corpus: Corpus, args: argparse.Namespace, described: dict[str, Any],
          console: Console) -> None:
    """All steps from the checkpoint, or from the first, to ``--stop-at``; the runs take turns on each batch."""
    first = load_checkpoint(args.resume, runs, described) if args.resume else 0
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=args.stop_at, completed=first)
        for step in range(first, args.stop_at):
            batch = on_device(corpus, "train", args, step)
            for run in runs:
                run.step(*batch, learning_rate(step, args.steps, args.lr))
            line = " · ".join(standing(run, args.batch * args.seq) for run in runs if AGAIN not in run.name)
            progress.update(task, advance=1, description=line)
            if step == first or (step + 1) % max(1, args.steps // 10) == 0:
                progress.console.print(f"step {step + 1:5d}  {line}", highlight=False)
            done = step + 1
            if args.checkpoint and (done == args.stop_at or done % args.checkpoint_every == 0):
                save_checkpoint(args.checkpoint, done, runs, described)


def explain_matmuls(args: argparse.Namespace, run: Run, batch: tuple[Tensor, Tensor], console: Console) -> Any:
    """The table "matmul → kernel, or why not" on the console and as HTML."""
    report = quartet.explain(run.model, *batch, options=quartet_options(args))
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    write_text(args.out / "explain.html", report.to_html())
    return report.to_dict()


def add_arguments(parser: argparse.ArgumentParser, size: str, steps: int, out: str) -> None:
    """What every program that trains with :func:`train` takes; ``size``, ``steps`` and ``out`` are defaults."""
    parser.add_argument("--size", choices=PRESETS, default=size,
                        help="tiny .1M, small 3.5M, demo 28M, large .9G parameters")
    parser.add_argument("--dim", type=int, help="width, with heads of 64 and a feed-forward of 3 times it")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, default=steps, help="length of the learning-rate schedule")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="end earlier than the schedule")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--seq", type=int, default=64, help="bytes a sequence")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=as_path, metavar="FILE", help="text to learn; default: Python's own library")
    parser.add_argument("--checkpoint", type=as_path, metavar="FILE",
                        help="save here every --checkpoint-every steps; '{step}' in the name becomes their number")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--resume", type=as_path, metavar="FILE", help="continue a checkpoint, bit for bit")
    parser.add_argument("--out", type=as_path, default=Path(out), metavar="DIR")
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="train the baseline too")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program at an argument that cannot be meant, before anything is read or compiled."""
    for name in ("dim", "layers", "steps", "stop_at", "batch", "seq", "checkpoint_every", "seeds"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; use 1 or more")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr is {args.lr}; use a number above 0")
    for name in ("data", "resume"):
        if (path := getattr(args, name)) is not None and not path.is_file():
            parser.error(f"--{name}: {path} is no file" if path.exists() else f"--{name}: there is no file {path}")
    try:
        quartet.Policy.coerce(getattr(args, "policy", None) or "quartet")
    except quartet.PolicyError as error:
        parser.error(f"--policy: {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "small", 350, "demo-out")
    parser.add_argument("--policy", help="recipe name or .toml file; default: quartet's own")
    parser.add_argument("--backend", default="quartet", help="torch.compile backend to train with")
    parser.add_argument("--compile-mode", help="a mode of torch.compile, for both runs")
    parser.add_argument("--seeds", type=int, default=1, metavar="N",
                        help="train the quantised model N times, which round differently: the spread of its gap")
    parser.set_defaults(device=None, size=None, batch=8, seq=None)
    args = parser.parse_args(argv)
    check(parser, args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = args.device.startswith("cuda")
    args.size, args.seq = args.size or ("large" if gpu else "small"), args.seq or (1024 if gpu else 64)
    args.stop_at = min(args.stop_at or args.steps, args.steps)
    if args.backend == BASELINE:
        args.compare = False
    return args


def prepare(args: argparse.Namespace, *settings: str) -> tuple[LlamaConfig, Corpus, Console, dict[str, Any]]:
    """Seed everything; the model's sizes, the text, the console, and what a checkpoint must agree in.

    Ends the program where results could not be written.
    """
    check_folder(args.out, "--out")
    if args.checkpoint:
        check_folder(args.checkpoint.parent, "--checkpoint")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    config, corpus = sizes(args), read_corpus(args.data)
    described = {"model": asdict(config), "train_bytes": len(corpus.train)} | {
        key: getattr(args, key) for key in ("steps", "batch", "seq", "lr", "seed", *settings)}
    return config, corpus, Console(width=None if sys.stdout.isatty() else 120), described


def announce(model: Llama, corpus: Corpus, args: argparse.Namespace, console: Console) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {args.batch} × {args.seq} bytes a step\n"
                  f"{len(corpus.train):,} bytes of {corpus.source}", highlight=False)
    if args.device == "cpu":
        console.print(SIMULATION, highlight=False, markup=False)
    if pyplot() is None:
        console.print(NO_PLOT, highlight=False, markup=False)


def measure(runs: list[Run], corpus: Corpus, args: argparse.Namespace) -> None:
    """Validation loss and bytes kept for backward of each run."""
    batch = on_device(corpus, "train", args, args.stop_at)
    for run in runs:
        run.validate(corpus, args)
        run.saved_bytes = saved_for_backward(run.compiled, run.model, *batch)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    config, corpus, console, described = prepare(args, "policy", "compile_mode")
    runs = make_runs(args, config)
    announce(runs[0].model, corpus, args, console)
    train(runs, corpus, args, described, console)
    described |= {"device": args.device}
    save(args.out / "result.json", runs, described)  # before anything else can fail
    measure(runs, corpus, args)
    save(args.out / "result.json", runs, described)
    batch = on_device(corpus, "train", args, args.stop_at)
    matmuls = explain_matmuls(args, runs[0], batch, console) if args.backend == "quartet" else None
    ahead = list(predictions())
    result = save(args.out / "result.json", runs, described | {"matmuls": matmuls, "predicted": ahead})
    show(runs, console)
    console.print(told(ahead), highlight=False, markup=False)
    plot(runs, args.out / "loss.png")
    return result


if __name__ == "__main__":
    main()
