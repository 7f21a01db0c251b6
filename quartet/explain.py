"""What happens to every matmul of a model: one cold compile, nothing kept."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quartet.lowering.recipe.records import MatmulRecord, MemoryRecord, SavedRecord
from quartet.model.absent import standing_in
from quartet.model.eager import Products, records_of, wanted
from quartet.model.flat import named_parameters
from quartet.model.names import Names, unwrapped
from quartet.options import Options
from quartet.passes.compilation import Observer
from quartet.passes.naming import module_name
from quartet.policy import Policy
from quartet.report.advice import UNPAID, advice
from quartet.report.predicted import predicted_speed
from quartet.report.table import Report
from quartet.runtime.breaks import Break, functions_left, graph_break
from quartet.runtime.capture import referred_to, unchanged
from quartet.runtime.devices import FEATURES, Target


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, mode: str | None = None,
            target: str | None = None, **kwargs: Any) -> Report:
    """Compile ``model(*args, **kwargs)`` without generating code and report every matmul, also those of layers that
    no graph holds, which run in eager after a graph break: to find these, a model that has any runs a second time.

    The model's buffers, gradients, training flags and the random state are as before afterwards; of a function, those
    of the modules that it refers to, and what optimizers that it refers to have stepped. Sizes are those of the
    inputs, whatever other sizes PyTorch has seen, unless they are marked dynamic. A model that
    ``torch.compile(…, backend="quartet")`` returned is explained with its own mode and options unless given here. One
    on the meta device is explained as on a CPU, or on ``target``, and nothing of it is allocated.

    Args:
        model: the module, or a function such as a training step; compiled or not.
        args: its inputs.
        kwargs: its inputs by name.
        options: as for ``torch.compile(model, backend="quartet")``.
        mode: as for ``torch.compile``.
        target: ``"b200"``, ``"rtx 3090"``, ``"sm_90"``, ``"gfx950"``, …: as if the tensors were on such a GPU. Nothing
            runs then.
    Returns:
        A :class:`quartet.report.table.Report`; print it, ``to_dict()``, ``to_html()``.

    Raises:
        UnsupportedMatmul: under ``strict``, a matmul that the policy quantises and that cannot be, or is in no graph.
    """
    from quartet.backend import compile_graph
    from quartet.lowering import registry
    from quartet.model.judge import Judge
    from quartet.passes import pipeline
    from quartet.runtime.capture import Capture, Pretence, settings_of

    _check_arguments(model, kwargs)
    inner, own_mode, own_options = settings_of(model)
    if options is None and mode is None:
        options, mode = own_options, own_mode
    parsed = Options.parse(mode, options, passes=pipeline.OPTIONAL, kernels=registry.disableable())
    parsed = replace(parsed, inspect=None, check=None)  # they change no decision, and nothing trains here
    judge, graphs = Judge(parsed.policy), []
    records: list[MatmulRecord] = []
    saved: list[SavedRecord] = []
    memory: list[MemoryRecord] = []
    breaks: list[Break] = []
    undumped: list[str] = []
    capture = Capture()
    if target is not None:
        parsed, capture = replace(parsed, target=Target.named(target)), Pretence()

    def noted(names: Any, found: list[MatmulRecord], kept: list[SavedRecord]) -> None:
        graphs.append(names)
        judge.add(names, found, kept)
        for text in judge.shared(names, found):
            warnings.warn(text, stacklevel=2)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        breaks.extend(filter(None, [graph_break()]))
        return compile_graph(gm, inputs, parsed, inner_compile=capture, collect=records.extend,
                             collect_saved=saved.extend, collect_memory=memory.extend,
                             collect_undumped=undumped.extend, say=noted, remember=False, observers=(stand_ins,))

    stand_ins = _StandIns(parsed)
    with standing_in(inner, (args, kwargs)) as (inner, (args, kwargs)):
        roots = referred_to(inner)
        with unchanged(inner), functions_left(breaks):
            torch.compile(inner, backend=backend)(*args, **kwargs)
        eager, unused = _outside(inner, args, kwargs, records, graphs, breaks, parsed.policy)
    if parsed.strict:
        _refuse(eager, parsed.policy)
    records += eager
    for text in judge.unmatched(graphs[-1], known=True) if graphs else ():
        warnings.warn(text, stacklevel=2)
    tensors = (t for root in roots for t in (*root.parameters(), *root.buffers()))
    device = next((t.device for t in tensors), torch.device("cpu"))
    chosen_for = parsed.target or Target.of(device)
    notes = (*capture.notes, *_prices(parsed.policy, chosen_for, records), *_foreign(chosen_for), *stand_ins.notes(),
             *unused, *(f"the dump in {parsed.dump} is not whole: {text}" for text in undumped[:1]))
    return Report(records, saved_bytes_total=capture.saved_bytes, device=target or str(device),
                  policy=str(parsed.policy), notes=notes, saved=saved, memory=memory,
                  predicted=predicted_speed(records, parsed.policy, chosen_for, memory),
                  graphs=None if parsed.dump is None or undumped else f"{parsed.dump}/index.html")


def _check_arguments(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for what is no model, and for an option in the place of a model's own argument."""
    if not callable(model):
        raise TypeError(f"quartet.explain takes a module or a function, not {type(model).__name__}")
    options = Options.declared().keys() & kwargs.keys()
    if not options:
        return
    taken = inspect.signature(getattr(model, "forward", model)).parameters
    for name in sorted(options - taken.keys()):
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise TypeError(f"{name} is an option, not an argument of the model: explain(model, …, "
                            f"options={{{name!r}: {kwargs[name]!r}}})")


def _outside(model: Any, args: Any, kwargs: Any, records: Sequence[MatmulRecord], graphs: Sequence[Names],
             breaks: Sequence[Break], policy: Policy) -> tuple[list[MatmulRecord], list[str]]:
    """Records of the products that no graph holds, and notes on the layers that did not run at all."""
    roots = [unwrapped(root) for root in referred_to(model)]
    held = {module_name(weight) for names in graphs for weight in names.weights.values()} | {r.fqn for r in records}
    layers = {module_name(name): p.numel() for root in roots for name, p in named_parameters(root) if p.dim() > 1}
    if not breaks and layers.keys() <= held:
        return [], []
    if not breaks and not isinstance(model, torch.nn.Module):
        return [], []
    products = Products(roots)
    with unchanged(model), products:
        model(*args, **kwargs)
    eager = records_of(products.found, records, breaks, policy)
    idle = [name for name in layers if name not in held and name not in {r.fqn for r in eager}]
    shown = ", ".join(idle[:3]) + (", …" if len(idle) > 3 else "")
    return eager, [f"{len(idle)} parameters take no part with these inputs: {shown}"] if idle else []


def _refuse(eager: Sequence[MatmulRecord], policy: Policy) -> None:
    """Raise UnsupportedMatmul for layers that the policy quantises and no graph holds."""
    from quartet.passes.plan.plan import UnsupportedMatmul

    refused = wanted(eager, policy)
    names = list(dict.fromkeys(r.fqn or f"a {r.op_class} product" for r in refused))
    if names:
        others = f"; likewise {', '.join(names[1:])}" if len(names) > 1 else ""
        raise UnsupportedMatmul(f"strict=True, and {names[0]} cannot be quantised: {refused[0].reason}{others}")


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
        yield f"no measured rates for {target}: whether it pays is not asked"
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
