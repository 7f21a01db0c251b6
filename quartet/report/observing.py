"""What a dump is told of a compilation, and what a compilation tells its observers when the graph has been split."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from importlib.metadata import version
from typing import Any

import torch
from torch.fx import Graph

from quartet.options import Options
from quartet.passes.compilation import Observer
from quartet.passes.find.find_matmuls import input_indices
from quartet.report.dump import GraphDump
from quartet.runtime import compat
from quartet.runtime.capture import saved_bytes


def dump_of(options: Options, weights: Mapping[int, str], device: Any) -> GraphDump | None:
    """Writes the graphs of a compilation to the folder of its option ``dump``, and as artifacts where PyTorch writes a
    structured trace; None where nobody asks for either. ``weights``: input → parameter."""
    if options.dump is None and not os.environ.get("TORCH_TRACE"):
        return None
    given = {name: getattr(options, name) for name, f in Options.declared().items()
             if name not in ("policy", "dump") and f.default is not MISSING and getattr(options, name) != f.default}
    about = {
        "policy": str(options.policy), "device": str(options.target or device),
        "options": ", ".join(f"{name}={value!r}" for name, value in {**given, **options.inductor}.items()) or "–",
        "mode": options.mode or "default", "torch": torch.__version__, "quartet": version("torch-quartet"),
        "python": platform.python_version(), "compiled": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    made = GraphDump(options.dump, compat.emit_artifact, about, lambda graph: _parameters(graph, weights))
    made.cached = options.dump is None
    return made


def _parameters(graph: Graph, weights: Mapping[int, str]) -> dict[str, str]:
    """Placeholder → name of the parameter."""
    return {node.name: weights[index] for node, index in input_indices(graph).items()
            if index is not None and index in weights}


def telling(inner: Callable[..., Any], observers: Sequence[Observer]) -> Callable[..., Any]:
    """An inner compiler that tells observers first what forward leaves for backward."""
    def compile(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            for observer in observers:
                observer.kept(0 if kwargs.get("is_inference") else saved_bytes(gm))
        return inner(gm, example_inputs, **kwargs)

    return compile
