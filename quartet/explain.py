"""What happens to every matmul of a model: one cold compile, nothing kept."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quartet.lowering.recipe.records import MatmulRecord, MemoryRecord, SavedRecord
from quartet.options import Options
from quartet.passes.compilation import Observer
from quartet.policy import Policy
from quartet.report.advice import UNPAID, advice
from quartet.report.table import Report
from quartet.runtime.devices import FEATURES, Target


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, mode: str | None = None,
            target: str | None = None, **kwargs: Any) -> Report:
    """Compile ``model(*args, **kwargs)`` without generating code and report every matmul.

    The model's buffers, gradients, training flags and the random state are as before afterwards. Sizes are those of the
    inputs, whatever other sizes PyTorch has seen, unless they are marked dynamic. A model that
    ``torch.compile(…, backend="quartet")`` returned is explained with its own mode and options unless given here.

    Args:
        model: the module, compiled or not. args, kwargs: inputs of its forward.
        options, mode: as for ``torch.compile(model, backend="quartet")``.
        target: ``"b200"``, ``"rtx 3090"``, ``"sm_90"``, ``"gfx950"``, …: as if the tensors were on such a GPU. Nothing
            runs then.
    Returns:
        A :class:`quartet.report.table.Report`; print it, ``to_dict()``, ``to_html()``.
    """
    from quartet.backend import compile_graph
    from quartet.lowering import registry
    from quartet.model.judge import Judge
    from quartet.passes import pipeline
    from quartet.runtime.capture import Capture, Pretence, settings_of, unchanged

    inner, own_mode, own_options = settings_of(model)
    if options is None and mode is None:
        options, mode = own_options, own_mode
    parsed = Options.parse(mode, options, passes=pipeline.OPTIONAL, kernels=registry.disableable())
    judge, graphs = Judge(parsed.policy), []
    records: list[MatmulRecord] = []
    saved: list[SavedRecord] = []
    memory: list[MemoryRecord] = []
    capture = Capture()
    if target is not None:
        parsed, capture = replace(parsed, target=Target.named(target)), Pretence()

    def noted(names: Any, found: list[MatmulRecord], kept: list[SavedRecord]) -> None:
        graphs.append(names)
        judge.add(names, found, kept)
        for text in judge.shared(names, found):
            warnings.warn(text, stacklevel=2)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, parsed, inner_compile=capture, collect=records.extend,
                             collect_saved=saved.extend, collect_memory=memory.extend, say=noted, remember=False,
                             observers=(stand_ins,))

    stand_ins = _StandIns(parsed)
    with unchanged(inner):
        torch.compile(inner, backend=backend)(*args, **kwargs)
    for text in judge.unmatched(graphs[-1], known=True) if graphs else ():
        warnings.warn(text, stacklevel=2)
    device = next((t.device for t in (*inner.parameters(), *inner.buffers())), torch.device("cpu"))
    chosen_for = parsed.target or Target.of(device)
    notes = (*capture.notes, *_prices(parsed.policy, chosen_for, records), *_foreign(chosen_for), *stand_ins.notes())
    return Report(records, saved_bytes_total=capture.saved_bytes, device=target or str(device),
                  policy=str(parsed.policy), notes=notes, saved=saved, memory=memory)


class _StandIns(Observer):
    """Watches which ops run by another provider than the preferred one."""

    def __init__(self, options: Options) -> None:
        self._options, self._found = options, Counter[str]()

    def finish(self, records: Sequence[MatmulRecord], gm: torch.fx.GraphModule) -> None:
        from quartet.lowering.ir import providers

        target = self._options.target
        self._found.update(providers.stand_ins(gm.graph, lambda device: target or Target.of(device),
                                               self._options.disable_kernels, self._options.portable_rounding))

    def notes(self) -> Iterator[str]:
        """A line for each op and reason."""
        return (f"{count} × {text}" for text, count in self._found.items())


def _prices(policy: Policy, target: Target, records: Sequence[MatmulRecord]) -> Iterator[str]:
    """Notes on what pays: where that could not be told, where nothing does, and by rates that nobody has measured."""
    from quartet.lowering.rates import rates_of

    if not policy.where_it_pays:
        return
    rates = rates_of(target)
    if rates is None and target.type != "cuda":
        yield f"no measured rates for {target}: everything is quantised, whether it pays or not"
    elif not any(r.lowered for r in records) and any(r.reason.startswith(UNPAID) for r in records):
        yield f"the default quantises nothing here. {advice(records, target)}"
    if rates is not None and not rates.origin.measured and not target.pretended:
        yield f"what pays is told by {rates.source}; `quartet calibrate` measures this GPU"


def _foreign(target: Target) -> Iterator[str]:
    """A note of what is missing for a GPU that is not NVIDIA's."""
    if target.foreign is not None:
        lacking = sorted(FEATURES.keys() - target.features - {"nvidia instructions"})
        yield (f"{target.foreign}: what is quantised runs as code that Inductor generates; missing are fused "
               f"quantisers, and products with {', '.join(lacking)}")
