"""What ``quartet bench`` does: a few training steps of a user's model as it is and under policies, side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartet.cli.doctor import table
from quartet.report.text import human_bytes

AS_IT_IS = "as it is"  # under Inductor, in the model's own dtype
SIMULATION = "on a CPU low precision is a simulation: losses and kept bytes are real, times are not those of a GPU"


@dataclass
class Run:
    """One policy.

    Attributes:
        compile_seconds: of the first step. ms: median of the steps after the second; spread: their middle half.
        peak_bytes: of the GPU, at most allocated; None on a CPU. kept_bytes: between forward and backward.
        losses: of each step. failure: why there are no more; empty where all went well.
    """

    policy: str
    compile_seconds: float = 0.0
    ms: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)
    peak_bytes: int | None = None
    kept_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    failure: str = ""


@dataclass
class Comparison:
    """The model as it is, and under each policy."""

    device: str
    objective: str
    runs: list[Run]

    def text(self) -> str:
        """A table, and what it is to be read by."""
        own = self.runs[0]
        rows = [("", "ms a step", "speed", "peak", "kept", "compile", "loss")]
        for run in self.runs:
            if run.failure:
                rows.append((run.policy, run.failure, "", "", "", "", ""))
                continue
            rows.append((run.policy, f"{run.ms:.1f} ({run.spread[0]:.1f}–{run.spread[1]:.1f})",
                         f"{own.ms / run.ms:.2f}×" if own.ms else "–", human_bytes(run.peak_bytes),
                         human_bytes(run.kept_bytes), f"{run.compile_seconds:.1f} s", f"{run.losses[-1]:.4f}"))
        steps = max(len(run.losses) for run in self.runs)
        notes = [f"{self.device}; loss after {steps} steps: {self.objective}"]
        return "\n".join([table(rows, indent=""), *notes, *([SIMULATION] if self.device == "cpu" else [])])

    def as_dict(self) -> dict[str, Any]:
        """The same, JSON-serialisable."""
        return {"device": self.device, "objective": self.objective, "simulation": self.device == "cpu",
                "torch": torch.__version__, "runs": [asdict(run) for run in self.runs]}

    def plot(self, path: Path) -> None:
        """Losses over steps, and times as bars, by matplotlib. Raises OSError where it cannot be written."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="tight")
        losses, times = figure.subplots(1, 2)
        good = [run for run in self.runs if not run.failure]
        for run in good:
            losses.plot(run.losses, label=run.policy)
        losses.set(xlabel="step", ylabel="loss")
        losses.legend(fontsize="small")
        times.barh([run.policy for run in good], [run.ms for run in good],
                   color=[f"C{i}" for i, _ in enumerate(good)])
        times.invert_yaxis()
        times.set(xlabel=f"ms a step on {self.device}{', a simulation' if self.device == 'cpu' else ''}")
        figure.savefig(path)


def bench(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], policies: Sequence[str], steps: int,
          lr: float) -> Comparison:
    """Train copies of a model for ``steps`` steps of AdamW on the same inputs, from the same numbers."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if isinstance(model, nn.Module) else (
        tensors[0].device if tensors else torch.device("cpu"))
    runs, objective = [], ""
    for policy in (None, *policies):
        run = Run(policy or AS_IT_IS)
        try:
            objective = _train(copy.deepcopy(model), args, kwargs, policy, steps, lr, device, run)
        except Exception as error:  # of one policy; the others are still worth a row
            run.failure = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}"
        runs.append(run)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Comparison(name, objective, runs)


def _train(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], policy: str | None, steps: int, lr: float,
           device: torch.device, run: Run) -> str:
    """Fill ``run``; what the loss is."""
    torch.manual_seed(0)
    torch.compiler.reset()
    gpu = device.type == "cuda"
    chosen: dict[str, Any] = {"backend": "inductor"} if policy is None else {
        "backend": "quartet", "options": {"policy": policy}}
    compiled = torch.compile(model, **chosen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    times = []
    for step in range(steps):
        if gpu and step == 1:
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        kept = _Kept([*model.parameters(), *model.buffers(), *args, *kwargs.values()])
        with kept if step == 1 else nullcontext():  # with hooks in place a first step would compile otherwise
            loss, what = _objective(compiled(*args, **kwargs))
        run.kept_bytes = kept.bytes or run.kept_bytes
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - begin)
    run.compile_seconds = times[0]
    steady = sorted(times[2:] or times[1:])
    run.ms = 1e3 * statistics.median(steady)
    run.spread = 1e3 * steady[len(steady) // 4], 1e3 * steady[-1 - len(steady) // 4]
    if gpu:
        run.peak_bytes = torch.cuda.max_memory_allocated(device)
    return what


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages that forward saves, but those of some values that live anyway."""

    def __init__(self, alive: Sequence[Any]) -> None:
        super().__init__(self._note, lambda x: x)
        self._alive = {x.untyped_storage().data_ptr() for x in alive if isinstance(x, Tensor)}
        self._seen: dict[int, int] = {}

    def _note(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._alive:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(self._seen.values())


def _objective(output: Any) -> tuple[Tensor, str]:
    """A scalar to train by, and what it is: the model's own loss, or the mean square of what it gives."""
    own = getattr(output, "loss", None)
    if own is None and isinstance(output, Mapping):
        own = output.get("loss")
    first = next(_floats(output), None)
    if isinstance(own, Tensor):
        return own, "the model's own"
    if first is None:
        raise TypeError(f"the model returned {type(output).__name__}, in which there is no floating-point tensor")
    if first.dim() == 0:
        return first, "the model's own"
    return first.float().square().mean(), "mean square of its first output, since the model returns no loss"


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floats(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _floats(inner)
