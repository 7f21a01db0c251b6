"""What is kept between forward and backward, with and without saved activations in eight bits.

    python benchmarks/saved_activations.py                      bytes of both models, on a CPU under two minutes
    python benchmarks/saved_activations.py --gradients          and how far the gradients turn: runs the steps
    python benchmarks/saved_activations.py --peak --device cuda peak memory of a step too, by generated code: each
                                                                column in a process of its own, --together N at a time
    python benchmarks/saved_activations.py --json saved.json

Models: a Llama of 4 layers (``examples/llama.py``) and a vision transformer, both in bfloat16 with fused attention.
Columns: plain Inductor, ``quartet``, ``quartet`` with saved activations in E4M3 groups (COAT), the same with attention,
in Mesa's form, and plain Inductor under its own ``activation_quantization_aten_pass`` (E5M2 with a scale a tensor).
Bytes are those of everything that forward returns for backward and is no input, weights' codes included: the pair of
graphs is made by dynamo, AOTAutograd and the partitioner and never compiled further.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.nn.functional as F
from gpu_worker import Worker, WorkerError
from llama import Llama, LlamaConfig
from output import check_folder, write_json
from torch import Tensor, nn

from quartet import Policy
from quartet.backend import compile_graph
from quartet.options import Options
from quartet.runtime.capture import Capture, Pretence
from quartet.runtime.compat import compile_fx

GOAL = 0.45
PEER = {"activation_quantization_aten_pass": {
    "quant_type": "torch.float8_e5m2", "use_scaling": True, "size_in_mb": 2**-7, "exclude_primals": True,
    "quantize_dynamic_shape": False, "allowed_dtypes": "torch.bfloat16"}}
COLUMNS: dict[str, Any] = {
    "bf16": None,
    "quartet": Policy("quartet"),
    "quartet + e4m3/16": Policy("quartet").on(op="saved", recipe="e4m3/16"),
    "quartet + e4m3/16-attention": Policy("quartet").on(op="saved", recipe="e4m3/16-attention"),
    "quartet + mesa8": Policy("quartet").on(op="saved", recipe="mesa8"),
    "bf16 + e4m3/16": Policy(None).on(op="saved", recipe="e4m3/16"),
    "bf16 + Inductor's FP8 pass": PEER,
}


class Block(nn.Module):
    """A pre-norm block of a vision transformer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """``model(images, labels)`` is the mean cross-entropy; images [batch, 3, size, size], labels int64 [batch]."""

    def __init__(self, dim: int, layers: int, heads: int, size: int = 224, classes: int = 1000) -> None:
        super().__init__()
        patch = 16
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x).mean(1)).float(), labels)


def llama(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Llama(LlamaConfig(dim=512, layers=4, heads=8, ffn=1536), 512)
    return model, tuple(torch.randint(0, 256, (batch, 512)) for _ in range(2))


def vit(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ViT(384, 4, 6), (torch.randn(batch, 3, 224, 224).bfloat16(), torch.randint(0, 1000, (batch,)))


MODELS: dict[str, Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]] = {"llama": llama, "vit": vit}
BATCH = {"llama": 8, "vit": 32}


def saved(model: nn.Module, inputs: Sequence[Tensor], what: Any, capture: Capture) -> int:
    """Bytes kept between forward and backward of one step, which runs as ``capture`` runs graphs."""
    torch._dynamo.reset()

    def backend(gm: torch.fx.GraphModule, example: list[Any]) -> Any:
        if isinstance(what, Policy):
            return compile_graph(gm, example, Options.parse(None, {"policy": what}), inner_compile=capture)
        patches = {"post_grad_fusion_options": what} if what else {}
        return compile_fx(gm, example, inner_compile=capture, config_patches=patches)

    model.zero_grad()
    torch.manual_seed(1)
    torch.compile(model, backend=backend)(*inputs).backward()
    return capture.saved_bytes


def peak(name: str, column: str, batch: int, device: str) -> int:
    """Most bytes that a step of generated code takes beyond parameters, gradients and inputs, on a GPU.

    What outlives a step, as quantised weights that serve until the next optimizer step, is part of them.
    """
    model, inputs = prepared(name, batch, device)
    what = COLUMNS[column]
    if isinstance(what, Policy):
        run = torch.compile(model, backend="quartet", options={"policy": what})
    else:
        run = torch.compile(model, options={"post_grad_fusion_options": what} if what else {})
    for _ in range(3):
        run(*inputs).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run(*inputs).backward()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers(), *inputs]
    return torch.cuda.max_memory_allocated() - sum(t.numel() * t.element_size() for t in held if t is not None)


def peaks(names: Sequence[str], args: argparse.Namespace) -> dict[tuple[str, str], int | None]:
    """:func:`peak` of every column of some models, each in a process that has nothing else in its memory.

    None for a column that failed; why is printed.
    """
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // args.together))}

    def one(case: tuple[str, str]) -> int | None:
        name, column = case
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", column, "--models", name, "--device",
                   args.device, *(["--batch", str(args.batch)] if args.batch else [])]
        worker = Worker(command, threads, patience=900)
        try:
            return int(worker.answer()["peak"])
        except WorkerError as error:
            print(f"{name}, {column} failed: {error}", file=sys.stderr)
            return None
        finally:
            worker.end()

    cases = [(name, column) for name in names for column in COLUMNS]
    with ThreadPoolExecutor(args.together) as pool:
        return dict(zip(cases, pool.map(one, cases), strict=True))


def _gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def prepared(name: str, batch: int, device: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model in bfloat16, and inputs for it."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](batch)
    return model.bfloat16().to(device), tuple(x.to(device) for x in inputs)


def measure(name: str, batch: int, device: str, gradients: bool) -> list[dict[str, Any]]:
    """One row a column of the table; ``cosine`` is with the gradients of the same products and exact activations."""
    model, inputs = prepared(name, batch, device)
    rows: list[dict[str, Any]] = []
    exact: dict[bool, Tensor] = {}
    for column, what in COLUMNS.items():
        count = saved(model, inputs, what, Capture() if gradients else Pretence())
        row = {"model": name, "batch": batch, "column": column, "bytes": count,
               "of_bf16": count / (rows[0]["bytes"] if rows else count)}
        if gradients:
            found = _gradients(model)
            reference = exact.setdefault(isinstance(what, Policy) and what.default is not None, found)
            row["cosine"] = F.cosine_similarity(found, reference, dim=0).item()
        rows.append(row)
    return rows


MORE: dict[str, Callable[[Any], str]] = {
    "cosine": lambda value: f"{value:.4f}", "peak": lambda value: f"{value / 2**20:.1f} MiB",
    "peak_of_bf16": lambda value: f"{value:.3f}"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    more = [key for key in MORE if key in rows[0]]
    lines = ["| " + " | ".join(["model", "", "kept for backward", "of BF16's", *more]) + " |",
             "|---|---|" + "---:|" * (2 + len(more))]
    for row in rows:
        cells = (row["model"], row["column"], f"{row['bytes'] / 2**20:.1f} MiB", f"{row['of_bf16']:.3f}",
                 *("failed" if row[key] is None else MORE[key](row[key]) for key in more))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--batch", type=int, help="sequences or images (default 8 and 32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gradients", action="store_true", help="also compare the gradients with exact ones")
    parser.add_argument("--peak", action="store_true", help="compile and run too, for the peak memory of a step (GPU)")
    parser.add_argument("--together", type=int, default=4, metavar="N", help="processes of --peak at a time")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--worker", choices=COLUMNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak and not args.device.startswith("cuda"):
        parser.error("peak memory is measured on a GPU; add --device cuda")
    if unknown := [name for name in args.models.split(",") if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; possible: {', '.join(MODELS)}")
    if args.json:
        check_folder(args.json.parent, "--json")
    names = args.models.split(",")
    if args.worker is not None:
        (name,) = names
        print(json.dumps({"peak": peak(name, args.worker, args.batch or BATCH[name], args.device)}), flush=True)
        return
    found = peaks(names, args) if args.peak else {}
    rows = [row for name in names for row in measure(name, args.batch or BATCH[name], args.device, args.gradients)]
    for row in rows if args.peak else ():
        row["peak"] = found[row["model"], row["column"]]
        base = found[row["model"], "bf16"]
        row["peak_of_bf16"] = row["peak"] / base if row["peak"] and base else None
    sizes = ", ".join(f"{name} batch {args.batch or size}" for name, size in BATCH.items())
    print(f"torch {torch.__version__}, {args.device}, {sizes}")
    print(table(rows))
    for row in rows:
        if row["column"].startswith("quartet + "):
            verdict = "reached" if row["of_bf16"] <= GOAL else "missed"
            print(f"{row['model']}, {row['column']}: {row['of_bf16']:.3f} of BF16's bytes, goal {GOAL} {verdict}")
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "device": args.device, "goal": GOAL, "rows": rows})


if __name__ == "__main__":
    main()
