"""The quartet backend without generated code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.capture import Capture


def uncompiled(gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
               options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The backend's graphs, run as they are; the arguments are those of ``quartet.backend.quartet``."""
    parsed = Options.parse(mode, options, passes=pipeline.OPTIONAL, kernels=registry.NAMES)
    return compile_graph(gm, example_inputs, parsed, inner_compile=Capture())
