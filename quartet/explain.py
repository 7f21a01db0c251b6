"""What happens to every matmul of a model: one cold compile, nothing kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quartet.lowering.records import MatmulRecord
from quartet.options import Options
from quartet.report import Report


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, mode: str | None = None,
            **kwargs: Any) -> Report:
    """Compile ``model(*args, **kwargs)`` without generating code and report every matmul.

    The model's buffers, gradients, training flags and the random state are as before afterwards. A model that
    ``torch.compile(…, backend="quartet")`` returned is explained with its own mode and options unless given here.

    Args:
        model: the module, compiled or not. args, kwargs: inputs of its forward.
        options, mode: as for ``torch.compile(model, backend="quartet")``.
    Returns:
        A :class:`quartet.report.Report`; print it, ``to_dict()``, ``to_html()``.
    """
    from quartet.backend import compile_graph
    from quartet.lowering import registry
    from quartet.passes import pipeline
    from quartet.runtime.capture import Capture, settings_of, unchanged

    inner, own_mode, own_options = settings_of(model)
    if options is None and mode is None:
        options, mode = own_options, own_mode
    parsed = Options.parse(mode, options, passes=pipeline.OPTIONAL, kernels=registry.NAMES)
    records: list[MatmulRecord] = []
    capture = Capture()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, parsed, inner_compile=capture, collect=records.extend)

    with unchanged(inner):
        torch.compile(inner, backend=backend)(*args, **kwargs)
    device = next((str(t.device) for t in (*inner.parameters(), *inner.buffers())), "cpu")
    return Report(records, saved_bytes_total=capture.saved_bytes, device=device, policy=str(parsed.policy),
                  notes=capture.notes)
