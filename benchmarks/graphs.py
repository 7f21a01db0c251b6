"""What small models compile to, as text: whether a change of the package's inside changes any graph.

    python benchmarks/graphs.py --out before
    python benchmarks/graphs.py --out after --against before        # exit status 1 where something differs

One file for each model of ``graph_models.py``, setting and target: the joint graph after all passes, the forward and
backward graphs, and what the report says of each product and of what is saved. Nodes are numbered, so their names do
not matter. No GPU is needed: kernels are chosen for GPUs that are only named, and nothing runs.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from graph_models import CASES, Case
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy, PolicyError
from quartet.runtime.capture import Pretence
from quartet.runtime.devices import Target

CLASSES = ("linear", "router", "lm_head", "embedding", "conv", "grouped", "attention", "bmm")
TARGETS = ("cpu", "sm_90", "sm_100")
MOST_LINES = 40  # of the difference of a file


@dataclass(frozen=True)
class Setting:
    """A recipe on every op class that it is possible on, one for saved activations, and options beside the policy."""

    recipe: str
    saved: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        policy = Policy(self.recipe)
        for name in CLASSES:
            try:
                policy = policy.on(name, self.recipe)
            except PolicyError:
                continue  # not possible on this op class
        return policy if self.saved is None else policy.on(op="saved", recipe=self.saved)


SETTINGS: dict[str, Setting] = {
    "quartet": Setting("quartet"),
    "quartet-paper": Setting("quartet-paper", options={"recompute": "none", "portable_rounding": True}),
    "fp8": Setting("fp8", "e4m3/16-attention", {"accumulation": "promoted"}),
    "fp8-rowwise": Setting("fp8-rowwise"),
    "fp8-trillion": Setting("fp8-trillion"),
    "mxfp8": Setting("mxfp8", options={"disable_kernels": ("cutlass",)}),
    "nvfp4": Setting("nvfp4", options={"inductor": {"max_autotune": True}}),
    "tetrajet-ema": Setting("tetrajet-ema", "mesa8", {"disable_kernels": ("cutlass",)}),
    "fp4-dge": Setting("fp4-dge"),
    "bitnet": Setting("bitnet"),
}


def text_of_graph(graph: Graph) -> str:
    """One line a node: number, op, arguments, dtype, shape and strides of the result, direction and recompute tag."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return "\n".join(_line(node, number) for node in graph.nodes)


def _line(node: Node, number: dict[Node, str]) -> str:
    arguments = [_argument(a, number) for a in node.args]
    arguments += [f"{key}={_argument(a, number)}" for key, a in node.kwargs.items()]
    tags = [str(node.meta[key]) for key in ("partitioner_tag", "recompute") if key in node.meta]
    shown = "" if node.op == "output" else f" : {_result(node.meta.get('val'))}"
    return f"{number[node]} = {_op(node)}({', '.join(arguments)}){shown}{''.join(f' | {tag}' for tag in tags)}"


def _op(node: Node) -> str:
    if node.op == "get_attr":
        value: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return f"constant {_constant(value)}"
    if node.op == "call_function":
        return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else _callable(node.target)
    return node.op if node.op in ("placeholder", "output") else f"{node.op} {node.target}"


def _constant(value: Any) -> str:
    if isinstance(value, GraphModule):
        return f"{{\n{text_of_graph(value.graph)}\n}}"
    if isinstance(value, Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{_result(value)} {hashlib.sha256(content).hexdigest()[:12]}"
    return _argument(value, {})


def _callable(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _argument(value: Any, number: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return number[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v, number) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_argument(v, number)}' for key, v in value.items())}}}"
    if isinstance(value, str):
        return repr(value)
    if callable(value) and not isinstance(value, torch.dtype):
        return _callable(value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _result(value: Any) -> str:
    if isinstance(value, Tensor):
        shape, strides = (", ".join(map(str, sizes)) for sizes in (value.shape, value.stride()))
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}] ({strides})"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_result, value))})"
    return str(value)


def text_of_products(records: Iterable[Any]) -> str:
    """One line a forward, dgrad and wgrad product."""
    return "\n".join(
        f"{r.site} {r.fqn or '-'} {r.op_class} {r.role}: {r.batch} × {r.m} × {r.n} × {r.k} {r.dtype}, {r.recipe} → "
        f"{r.kernel}, saves {r.saved_bytes}; {'; '.join((r.reason, *r.notes))}" for r in records)


def text_of_saved(records: Iterable[Any]) -> str:
    """One line a tensor that is kept between forward and backward."""
    return "\n".join(f"{r.fqn or '-'} {r.op} {list(r.shape)} {r.dtype}: {r.bytes} as {r.saved} {r.saved_bytes}; "
                     f"{r.reason}" for r in records)


def compiled(case: Case, setting: Setting, target: str) -> str:
    """Everything that one compilation gives, as text."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, inputs = case.make()
    parts: list[tuple[str, str]] = []

    def after_all_passes(graph: Graph) -> None:
        parts.append(("joint graph", text_of_graph(graph)))

    class Shown(Pretence):
        def __call__(self, gm: GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
            parts.append(("backward" if kwargs.get("is_backward") else "forward", text_of_graph(gm.graph)))
            return super().__call__(gm, example_inputs, **kwargs)

    given = {"policy": setting.policy, "open_attention": case.open_attention, "target": Target.named(target),
             **setting.options}
    given["inductor"] = {**given.get("inductor", {}), "joint_custom_post_pass": after_all_passes}

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_graph(
            gm, example_inputs, Options(**given), Shown(), remember=False, say=lambda *_: None,
            collect=lambda records: parts.append(("products", text_of_products(records))),
            collect_saved=lambda records: parts.append(("saved", text_of_saved(records))))

    with torch.set_grad_enabled(case.trains):
        out = torch.compile(model, backend=backend, dynamic=case.dynamic)(*inputs)
    if case.trains:
        out.float().square().mean().backward()
    return "".join(f"== {title}\n{text}\n" for title, text in parts)


def differences(name: str, ours: Path, other: Path) -> list[str]:
    """Lines that say how a file differs from its namesake in another folder; none where it does not.

    Numbers of nodes are left out where something else differs: one node more would change all that follow.
    """
    old, new = ((folder / name).read_text(encoding="utf-8") if (folder / name).exists() else None
                for folder in (other, ours))
    if old == new:
        return []
    if old is None or new is None:
        return [f"only in {ours if old is None else other}"]
    plain = [re.sub(r"%\d+", "%", text) for text in (old, new)]
    pair = (old, new) if plain[0] == plain[1] else plain
    lines = list(difflib.unified_diff(*(text.splitlines() for text in pair), str(other / name), str(ours / name),
                                      n=1, lineterm=""))
    more = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"… and {more} lines more"] if more > 0 else [])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the texts")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with the texts of an earlier run")
    for option, names in (("--models", CASES), ("--settings", SETTINGS), ("--targets", TARGETS)):
        parser.add_argument(option, nargs="+", choices=list(names), default=list(names), metavar="NAME",
                            help=f"of {', '.join(names)} (default: all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.against is not None and not args.against.is_dir():
        raise SystemExit(f"--against {args.against}: there is no such folder")
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    names = []
    for model in args.models:
        start = time.perf_counter()
        for setting, target in product(args.settings, args.targets):
            names.append(f"{model}.{setting}.{target}.txt")
            (args.out / names[-1]).write_text(compiled(CASES[model], SETTINGS[setting], target), encoding="utf-8")
        print(f"{model}: {time.perf_counter() - start:.0f} s", flush=True)
    if args.against is None:
        return 0
    found = {name: lines for name in names if (lines := differences(name, args.out, args.against))}
    for name, lines in found.items():
        print("\n".join((name, *lines)))
    print(f"{len(found)} of {len(names)} differ from {args.against}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
