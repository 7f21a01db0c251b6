"""The backend that ``torch.compile(model, backend="quartet")`` calls."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quartet.inspect.inspector import recorder_of
from quartet.lowering import registry
from quartet.lowering.ir.ops import fused
from quartet.lowering.rates import Rates, rates_of
from quartet.lowering.recipe.records import MatmulRecord, MemoryRecord, SavedRecord
from quartet.lowering.recipe.types import ROLES, Gemm
from quartet.lowering.targets import inductor
from quartet.model.first_use import calibrate_once
from quartet.model.fused import open_layers
from quartet.model.judge import Judge, judge_of
from quartet.model.left import met
from quartet.model.names import Names, names_of
from quartet.model.trained import tokens_for
from quartet.model.whole import Whole
from quartet.options import Options
from quartet.passes import pipeline
from quartet.passes.compilation import Compilation, Inspection, Observer
from quartet.passes.residuals.budget import Budget, default
from quartet.passes.residuals.cut import minimum_cut
from quartet.passes.residuals.partition import SavedActivations
from quartet.policy.recipes import quantizes, recipes_of, remembers
from quartet.policy.saved import saves
from quartet.recipes import PolicyError
from quartet.report.announce import decided, patiently
from quartet.report.dump import GraphDump
from quartet.report.observing import dump_of, telling
from quartet.runtime import compat
from quartet.runtime.agreement import same_kernels
from quartet.runtime.breaks import has_graph
from quartet.runtime.devices import Target
from quartet.runtime.frames import with_room
from quartet.runtime.in_place import warn_of_skipped
from quartet.runtime.inspect.calls import Inspected, Layers, no_token
from quartet.runtime.replay.library import LAUNCHER
from quartet.runtime.slots.amax import no_anchor
from quartet.runtime.slots.anchored_graph import Anchored, forget_examples, with_input
from quartet.runtime.slots.weights import REUSED
from quartet.runtime.streams import Streamed, sharing

log = logging.getLogger("quartet")
warn_of_skipped(sys._getframe())  # the first use of the backend imports this module; later ones ask nobody
compat.register_log()
inductor.register()


def quartet(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
            options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compile a graph with its matmuls in low precision; everything else is Inductor's.

    Args:
        gm: what dynamo captured. example_inputs: its inputs; those that are ``nn.Parameter`` are the weights.
        mode: a mode of torch.compile. options: see :class:`quartet.options.Options`.

    Raises:
        OptionError, PolicyError: an option or policy that does not exist; the message names the nearest.
        UnsupportedMatmul: under ``strict=True``, a matmul that the policy quantises and that cannot be.
    """
    parsed = Options.parse(mode, options, passes=pipeline.OPTIONAL, kernels=registry.disableable())
    return compile_graph(gm, example_inputs, parsed)


@with_room
def compile_graph(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options,
                  inner_compile: Callable[..., Any] | None = None,
                  collect: Callable[[list[MatmulRecord]], None] | None = None,
                  collect_saved: Callable[[list[SavedRecord]], None] | None = None,
                  collect_memory: Callable[[list[MemoryRecord]], None] | None = None,
                  collect_undumped: Callable[[list[str]], None] | None = None,
                  say: Callable[..., None] | None = None, remember: bool = True,
                  observers: Sequence[Observer] = ()) -> Callable[..., Any]:
    """:func:`quartet` with parsed options.

    ``inner_compile`` replaces Inductor's code generation, ``collect`` and its like get the records, or why a dump is
    not whole, ``observers`` see the graph around each pass. Whoever asks for any of them is not answered from a cache.
    ``say(names, records, saved)`` is called instead of warning of what the graphs of a model have shown so far.
    ``remember``: layers are decided from now on by the tokens that training has here, see ``quartet.model.trained``.
    """
    compat.warn_if_untested()
    if quantizes(options.policy):
        open_layers(gm)
    names = names_of(gm, example_inputs)
    if remember:
        met(names)
    options = replace(options, policy=options.policy.at(names.place))
    watched = any((inner_compile, collect, collect_saved, observers))
    device = next((value.device for value in example_inputs if isinstance(value, torch.Tensor)), torch.device("cpu"))
    if options.policy.where_it_pays and options.target is None and not watched:
        calibrate_once(device)
    if device.type == "cuda" and options.target is None and not watched:
        LAUNCHER.prepare()
        fused.prepare(Target.of(device), {side.spec for gemm in _gemms(options) for side in (gemm.a, gemm.b)})
    step = make_pipeline(gm, example_inputs, options, names, remember, observers, ahead=not watched)
    if step.config.reuse_weights:
        REUSED.watch()
    anchored = step.config.anchor is not None
    if anchored:
        gm, example_inputs = with_input(gm, example_inputs, no_anchor())
    inspected = step.config.token is not None
    if inspected:
        gm, example_inputs = with_input(gm, example_inputs, no_token(), "quartet_token")
    patches = {**options.inductor, "joint_custom_pre_pass": step}
    saved = make_partitioner(step, options)
    if saved is not None:
        patches["custom_partitioner_fn"] = saved
    extra = {} if inner_compile is None else {"inner_compile": inner_compile}
    if step.config.observers:
        extra = {"inner_compile": telling(inner_compile or compat.compile_fx_inner(), step.config.observers)}
    with sdpa_kernel(SDPBackend.MATH) if options.open_attention else nullcontext(), \
            compat.every_pass() if watched else patiently(gm), compat.cutting_by(minimum_cut):
        compiled = compat.compile_fx(gm, example_inputs, config_patches=patches, **extra)
    if not watched:
        decided(gm, example_inputs, step, bool(names.weights))
    if anchored or inspected:
        forget_examples(gm)
    if inspected:
        compiled = Inspected(compiled, recorder_of(options.inspect, names.model), _layers(names))
    if anchored:
        compiled = Anchored(compiled, sorted(step.config.weights))
    together = sharing(example_inputs, options.same_bits)
    if together is not None:
        compiled = Streamed(compiled, min(together))
    kept = [] if saved is None else saved.records
    if collect is not None:
        collect(step.records)
    if collect_saved is not None and kept:
        collect_saved(kept)
    if collect_memory is not None and saved is not None:
        collect_memory(saved.memory)
    if collect_undumped is not None:
        collect_undumped([o.failure for o in step.config.observers if isinstance(o, GraphDump) and o.failure])
    judge = judge_of(options.policy, names)
    (say or partial(_say, judge, options.target or Target.of(device)))(names, step.records, kept)
    if options.strict and say is None and names.model is not None:
        compiled = Whole(compiled, judge, names)
    if remember:
        has_graph()
    return compiled


def make_pipeline(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options,
                  names: Names | None = None, remember: bool = True,
                  observers: Sequence[Observer] = (), ahead: bool = False) -> pipeline.Pipeline:
    """The joint-graph pass for one dynamo graph, whose names are looked up unless given; ``ahead``: it will run."""
    names = names or names_of(gm, example_inputs)
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    if names.views and remembers(options.policy):
        raise PolicyError("a recipe of the policy keeps histories or averages of each parameter, and FSDP version 1 "
                          "computes with views that it makes anew for every forward. Shard by fully_shard of "
                          "torch.distributed.fsdp, or take a recipe without them, such as 'fp8'")
    training = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    tokens = tokens_for(gm, names.weights, names.compiled, training, remember)
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    observers = (*observers, *filter(None, [dump_of(options, names.weights, device)]))
    replayed = bool(compat.option(options.inductor, "triton.cudagraphs"))
    told = replace(options, reuse_weights=options.reuse_weights and not replayed,
                   memory=_budget(tensors, [example_inputs[i] for i in names.weights], options))
    if told.memory is not None and told.memory.kind == "fastest" and told.recompute is None:
        told = replace(told, recompute="none")
    if not quantizes(options.policy):
        told = replace(told, disable_passes=(*options.disable_passes, "canonicalize"))
    anchored = bool(names.weights) and remembers(options.policy)
    token = len(example_inputs) + anchored if options.inspect or options.check else None
    compilation = Compilation(
        **_shared(told), **_shared(names), options=options.key(), tokens=tokens.trained, guessed=tokens.guessed,
        partition=_partition(told), observers=tuple(observers),
        replayed=replayed, autotune=bool(compat.option(options.inductor, "max_autotune")), **_prices(tensors, told),
        anchor=len(example_inputs) if anchored else None, token=token,
        inspection=None if options.inspect is None else Inspection(options.inspect.recipes),
        answers=_answers(gm, example_inputs, options, remember), threads=torch.get_num_threads(),
        version=torch.__version__)
    earlier = (p for p in compat.user_joint_passes(options.inductor) if not isinstance(p, pipeline.Pipeline))
    return pipeline.Pipeline(compilation, tuple(earlier), ahead and options.target is None and not replayed)


def _shared(source: Any) -> dict[str, Any]:
    """The fields of a record that a compilation has too."""
    wanted = {f.name for f in fields(Compilation)} - {"options"}
    return {f.name: getattr(source, f.name) for f in fields(source) if f.name in wanted}


def _layers(names: Names) -> Layers:
    """How the layers are told apart that one graph serves."""
    return Layers.of(names.place, names.model if names.alike else None, names.serves,
                     {index: names.full(name) for index, name in names.weights.items()})


def _prices(tensors: Iterable[torch.Tensor], options: Options) -> dict[str, Any]:
    """What a compilation is told of the rates of the graph's devices, where the policy or a budget asks for them."""
    if not options.policy.where_it_pays and options.memory is None:
        return {}
    known = _rates(tensors, options)
    return {"priced": options.policy.where_it_pays and bool(known), "rates": repr(known) if known else ""}


def _rates(tensors: Iterable[torch.Tensor], options: Options) -> list[Rates]:
    targets = sorted({options.target or Target.of(tensor.device) for tensor in tensors}, key=repr)
    return [rates for rates in map(rates_of, targets) if rates is not None]


def _budget(tensors: Iterable[torch.Tensor], weights: Iterable[torch.Tensor], options: Options) -> Budget | None:
    """By what is chosen what is kept; None where recipes and rules say all.

    Unless the user asks, that is where products would run again that need not, and the time is known that it takes.
    """
    if options.memory is not None:
        return None if options.memory.kind == "recipe" else options.memory
    again = options.recompute is None and any(recipe.recompute == "gemm" for recipe in recipes_of(options.policy))
    divided = compat.replaces_partitioner() and compat.partitioner(options.inductor)[0] is None
    if not (again and divided and _rates(tensors, options)):
        return None
    sizes = [(weight.numel() * weight.element_size(), weight.requires_grad) for weight in weights]
    return default(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def _partition(options: Options) -> Callable[..., Any] | None:
    """What divides a joint graph where it is chosen by that what is kept."""
    if options.memory is None:
        return None
    own, default = compat.partitioner(options.inductor)
    own = own.own if isinstance(own, SavedActivations) else own
    return own or default


def make_partitioner(step: pipeline.Pipeline, options: Options) -> SavedActivations | None:
    """What splits the graph that ``step`` has rewritten, where anything that is kept may be in another format."""
    if step.config.memory is None and not saves(options.policy):
        return None
    own, default = compat.partitioner(options.inductor)
    if isinstance(own, SavedActivations):
        own = own.own
    return SavedActivations(step.config, own, default)


def _answers(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options, remember: bool) -> str:
    """:func:`kernels_here`, once the ranks of a job agree; one that only looks asks nobody."""
    if not remember or options.target is not None:
        return kernels_here(gm, example_inputs, options)
    return same_kernels(options.key(), lambda: kernels_here(gm, example_inputs, options),
                        sharing(example_inputs, options.same_bits))


def kernels_here(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> str:
    """What the kernels say of the products that the policy can ask for, on each device of the graph's matmuls."""
    values = (*example_inputs, *(node.meta.get("example_value") for node in gm.graph.nodes))
    devices = {value.device for value in values
               if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0}
    targets = map(Target.of, devices) if options.target is None else [options.target]
    exact = options.disable_kernels or options.portable_rounding or compat.default_store() is not None
    return registry.answers(targets, _gemms(options), options.disable_kernels, at_once=not exact)


def _gemms(options: Options) -> list[Gemm]:
    """Every product that the policy can ask for."""
    return [gemm for recipe in recipes_of(options.policy) for role in ROLES
            if (gemm := getattr(recipe, role)) is not None]


def _say(judge: Judge, target: Target, names: Names, records: Sequence[MatmulRecord],
         saved: Sequence[SavedRecord]) -> None:
    """Tell the user what is known of the model after one more graph of it."""
    judge.add(names, records, saved)
    for text in (*judge.shared(names, records), *judge.unmatched(names)):
        warnings.warn(text, stacklevel=3)
    text, expected = judge.nothing(names, target) or ("", False)
    if expected:
        log.warning(text)
    elif text:
        warnings.warn(text, stacklevel=3)
