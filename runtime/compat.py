"""The only module that imports private PyTorch names.

Each entry of ``PRIVATE`` is (module, name, purpose). All exist in torch 2.11 to 2.15; ``missing()``: what lacks here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from threading import Lock
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

TESTED = ("2.11", "2.13", "2.15")

PRIVATE = (
    ("torch._inductor.compile_fx", "compile_fx", "Inductor's entry: AOTAutograd, partitioner, code generation"),
    ("torch._inductor.compile_fx", "compile_fx_inner", "what forward keeps, told before its code is generated"),
    ("torch._inductor.custom_graph_pass", "CustomGraphPass", "a graph pass with a cache key"),
    ("torch._inductor", "list_mode_options", "what mode= means as configuration"),
    ("torch._inductor", "config", "valid option names, and the user's own joint pass"),
    ("torch._inductor.runtime.cache_dir_utils", "cache_dir", "what was decided is kept beside what was compiled"),
    ("torch._inductor.lowering", "register_lowering", "decomposition of our ops inside Inductor"),
    ("torch._inductor.lowering", "process_subgraph_nodes", "inlines a traced reference into Inductor's IR"),
    ("torch._inductor.lowering", "lowerings", "Inductor's own copy of a tensor"),
    ("torch._inductor", "ir", "fixes the layout of that copy"),
    ("torch._inductor.dependencies", "StarDep", "how many bytes all of an input has"),
    ("torch._inductor.virtualized", "V", "the graph that Inductor is lowering"),
    ("torch._inductor.decomposition", "select_decomp_table", "how far a traced reference is decomposed"),
    ("torch._inductor.custom_graph_pass", "CustomPartitionerFn", "where saved activations become codes"),
    ("torch._functorch.partitioners", "min_cut_rematerialization_partition", "the partitioner that comes before that"),
    ("torch._functorch", "partitioners", "where it looks for a minimum cut"),
    ("torch.fx._lazy_graph_module", "_make_graph_module", "copies of a graph whose Python nobody needs"),
    ("torch._ops", "OpOverload", "tells an operator of a printed graph from a function"),
    ("torch._ops", "OperatorBase", "the same for higher-order operators"),
    ("torch.utils._python_dispatch", "TorchDispatchMode", "what an op allocates, so that C++ can repeat it"),
    ("torch._guards", "TracingContext", "whether draws that nothing reads stay in a graph"),
    ("torch._guards", "detect_fake_mode", "the fake mode of a traced graph, and so the shapes of inserted nodes"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode", "explain() of a model on the meta device"),
    ("torch.fx.experimental.symbolic_shapes", "statically_known_true", "equality of symbolic sizes, without a guard"),
    ("torch._logging", "trace_structured", "artifacts that tlparse shows"),
    ("torch._logging._internal", "log_registry", "a name for our loggers in TORCH_LOGS"),
    ("torch._dynamo", "config", "explain() compiles once more without using up the limits of recompilation"),
    ("torch._dynamo.config", "recompile_limit", "the limit for one piece of code"),
    ("torch._dynamo.config", "accumulated_recompile_limit", "the limit for all of it"),
    ("torch._dynamo.config", "wrap_top_frame", "compiles layers of torch.nn in place, whose code dynamo skips"),
    ("torch._dynamo.trace_rules", "check", "whether dynamo skips a function"),
    ("torch.distributed.distributed_c10d", "_get_default_store", "what ranks tell each other outside of collectives"),
    ("torch._dynamo", "pgo", "explain() neither meets nor leaves sizes that make others symbolic"),
    ("torch._dynamo.pgo", "_CODE_STATE", "the sizes that each piece of code has seen"),
    ("torch._dynamo.pgo", "CodeState", "those of one"),
    ("torch._functorch", "config", "records are taken past the cache of AOTAutograd, whose hits run no pass"),
    ("torch._functorch.config", "enable_autograd_cache", "the switch of that cache"),
    ("torch._dynamo.utils", "counters", "cache hits, for tests"),
    ("torch._dynamo.symbolic_convert", "InstructionTranslator", "which code a graph comes from, and so its modules"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "the module inside of a compiled one"),
    ("torch._dynamo.utils", "get_compilation_metrics", "where dynamo has given up a function, and why"),
    ("torch._dynamo.utils", "set_compilation_metrics_limit", "for how many functions it remembers that"),
    ("torch._C._dynamo.eval_frame", "set_code_exec_strategy", "dynamo looks again at what it has left to Python"),
    ("torch._dynamo.types", "FrameExecStrategy", "what it does with a function, and with those that it calls"),
    ("torch._dynamo.types", "FrameAction", "what it can do"),
    ("torch._C", "_current_graph_task_id", "tells what runs in backward from what runs in forward"),
)


def missing() -> list[str]:
    """Private names that this PyTorch lacks, as ``module.name (purpose)``."""
    lacking = []
    for module, name, purpose in PRIVATE:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            lacking.append(f"{module}.{name} ({purpose})")
    return lacking


def _load(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ImportError(f"torch {torch.__version__} has no {module}.{name}, which quartet needs; tested versions: "
                          f"{', '.join(TESTED)}. Missing in all: {'; '.join(missing())}") from None


compile_fx: Callable[..., Any] = _load("torch._inductor.compile_fx", "compile_fx")
StarDep: Any = _load("torch._inductor.dependencies", "StarDep")
CustomGraphPass: type = _load("torch._inductor.custom_graph_pass", "CustomGraphPass")
list_mode_options: Callable[..., dict[str, Any]] = _load("torch._inductor", "list_mode_options")
try:
    CustomPartitionerFn: Any = _load("torch._inductor.custom_graph_pass", "CustomPartitionerFn")
except ImportError:  # only policies about saved activations need it
    CustomPartitionerFn = object
if TYPE_CHECKING:
    from torch._ops import OpOverload as OpOverload
else:
    OpOverload = _load("torch._ops", "OpOverload")
OperatorBase: Any = _load("torch._ops", "OperatorBase")
TorchDispatchMode: Any = _load("torch.utils._python_dispatch", "TorchDispatchMode")
inductor_config: Any = importlib.import_module("torch._inductor.config")
detect_fake_mode: Callable[..., Any] = _load("torch._guards", "detect_fake_mode")
FakeTensorMode: Any = _load("torch._subclasses.fake_tensor", "FakeTensorMode")
make_graph_module: Callable[..., torch.fx.GraphModule] = _load("torch.fx._lazy_graph_module", "_make_graph_module")
statically_known_true: Callable[..., bool] = _load("torch.fx.experimental.symbolic_shapes", "statically_known_true")


def inductor_cache_dir() -> str:
    """Where Inductor keeps what it has compiled."""
    return str(_load("torch._inductor.runtime.cache_dir_utils", "cache_dir")())


def compile_fx_inner() -> Callable[..., Any]:
    """What compiles the halves of a graph that was split."""
    return _load("torch._inductor.compile_fx", "compile_fx_inner")


def function_of(overload: Any) -> Callable[..., Any]:
    """What calls of an operator from Python end in."""
    return overload._op


def call_through(overload: Any, function: Callable[..., Any]) -> None:
    """Let calls of an operator from Python end in ``function``."""
    overload._op = function


def after_backward(function: Callable[[], None]) -> None:
    """Call it when the backward that autograd is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def known_symbols(environment: Any) -> Mapping[Any, Any]:
    """Symbol → its value at capture, for the symbols of a shape environment that had one."""
    renamed = getattr(environment, "backed_var_to_val", None)
    return environment.var_to_val if renamed is None else renamed  # torch 2.11 has the old name


def unbacked_size() -> int:
    """What Inductor assumes a size to be that only the data decides."""
    return inductor_config.unbacked_symint_fallback


def emit_artifact(name: str, text: str) -> None:
    """Attach a text to torch's structured trace (TORCH_TRACE), where tlparse shows it."""
    about = {"name": name, "encoding": "string"}
    _load("torch._logging", "trace_structured")("artifact", metadata_fn=lambda: about, payload_fn=lambda: text)


def register_log() -> None:
    """Let ``TORCH_LOGS="+quartet"`` address our loggers."""
    registry = _load("torch._logging._internal", "log_registry")
    if "quartet" not in registry.log_alias_to_log_qnames:
        registry.register_log("quartet", "quartet")


def option(options: Mapping[str, Any], name: str) -> Any:
    """What Inductor is told by this name, such as ``"triton.cudagraphs"``: by ``options``, else by its config."""
    return options[name] if name in options else attrgetter(name)(inductor_config)


def user_joint_passes(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The user's own ``joint_custom_pre_pass`` (a pass, several or None): of ``options``, else of Inductor's config."""
    own = option(options, "joint_custom_pre_pass")
    return tuple(own) if isinstance(own, (list, tuple)) else () if own is None else (own,)


def replaces_partitioner() -> bool:
    """Whether this PyTorch lets somebody replace the partitioner."""
    return CustomPartitionerFn is not object and hasattr(inductor_config, "custom_partitioner_fn")


def partitioner(options: Mapping[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """The user's own ``custom_partitioner_fn`` (of ``options``, else of Inductor's config) or None, and what splits the
    joint graph where there is none. Raises ImportError where this PyTorch lets nobody replace the partitioner.
    """
    if not replaces_partitioner():
        raise ImportError(f"torch {torch.__version__} has no torch._inductor.config.custom_partitioner_fn, without "
                          f"which activations cannot be saved in eight bits; tested versions: {', '.join(TESTED)}. "
                          "Leave out the rules with op='saved' and the option memory")
    own = option(options, "custom_partitioner_fn")
    return own, _load("torch._functorch.partitioners", "min_cut_rematerialization_partition")


def with_steps(function: Any, **steps: Callable[..., Any]) -> Callable[..., Any] | None:
    """PyTorch's partitioner, or a function that it calls, with others in place of some that it calls by these names:
    ``step(theirs)`` gives each. Nobody else's changes. None where it is no function of PyTorch's that calls these."""
    code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None or not function.__module__.startswith("torch._functorch.") or not (
            set(steps) <= {*code.co_names} & known.keys()):
        return None
    own = {**known, **{name: step(known[name]) for name, step in steps.items()}}
    made = FunctionType(code, own, code.co_name, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def changes_what_it_keeps() -> bool:
    """Whether PyTorch's partitioner has been told to quantise or to offload what it has chosen to keep."""
    passes: Mapping[str, Any] = getattr(inductor_config, "post_grad_fusion_options", {})
    functorch: Any = importlib.import_module("torch._functorch.config")
    return "activation_quantization_aten_pass" in passes or getattr(functorch, "enable_activation_offloading", False)


def keeps_dead_draws() -> bool:
    """Whether random numbers that nothing reads stay in a graph."""
    return _load("torch._guards", "TracingContext").try_get() is None or bool(inductor_config.fallback_random)


_cutting, _found = Lock(), list[Any]()  # what the first found there, once for each compilation under way


@contextmanager
def cutting_by(minimum_cut: Callable[..., Any]) -> Iterator[None]:
    """The partitioner asks ``minimum_cut(graph, source, sink)``, which answers as networkx's, or None to have it asked.
    Others may see it until the last of overlapping compilations has ended; it makes no difference to them."""
    partitioners: Any = importlib.import_module("torch._functorch.partitioners")
    asked = partitioners if hasattr(partitioners, "minimum_cut") else importlib.import_module("networkx")

    def ours(graph: Any, source: Any, sink: Any, *others: Any, **named: Any) -> Any:
        found = None if others or named else minimum_cut(graph, source, sink)
        return theirs(graph, source, sink, *others, **named) if found is None else found

    with _cutting:
        theirs = _found[0] if _found else asked.minimum_cut
        _found.append(theirs)
        asked.minimum_cut = ours
    try:
        yield
    finally:
        with _cutting:
            _found.pop()
            asked.minimum_cut = asked.minimum_cut if _found else theirs


_warned = False


def warn_if_untested() -> None:
    """One warning a process on a PyTorch version that the suite never ran on."""
    global _warned
    if _warned or ".".join(torch.__version__.split(".")[:2]) in TESTED:
        return
    _warned = True
    warnings.warn(f"torch {torch.__version__} has never been tested with quartet (tested: {', '.join(TESTED)})",
                  stacklevel=2)


def default_store() -> Any:
    """The store by which the ranks have met; None outside of a process group, and in one that is only pretended."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_backend() == "fake":
        return None
    return _load("torch.distributed.distributed_c10d", "_get_default_store")()


@contextmanager
def any_number_of_compilations() -> Iterator[None]:
    """No compilation is refused as one too many of its code object."""
    dynamo = importlib.import_module("torch._dynamo.config")
    with dynamo.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


@contextmanager
def no_sizes_seen() -> Iterator[None]:
    """Dynamo knows no sizes of earlier inputs, which would make other sizes symbolic, and remembers none of these."""
    profile: Any = importlib.import_module("torch._dynamo.pgo")
    kept, profile._CODE_STATE = profile._CODE_STATE, defaultdict(_load("torch._dynamo.pgo", "CodeState"))
    try:
        yield
    finally:
        profile._CODE_STATE = kept


@contextmanager
def every_pass() -> Iterator[None]:
    """Passes run, and graphs reach the inner compiler: AOTAutograd's cache would answer with code made earlier."""
    with importlib.import_module("torch._functorch.config").patch(enable_autograd_cache=False):
        yield


def is_wrapped(model: torch.nn.Module) -> bool:
    """Whether ``torch.compile`` has returned this module."""
    return isinstance(model, _load("torch._dynamo.eval_frame", "OptimizedModule"))


def is_skipped(model: torch.nn.Module) -> bool:
    """Whether ``model.compile(…)`` would compile nothing of the module itself: dynamo skips code of ``torch.nn``."""
    return bool(_load("torch._dynamo.trace_rules", "check")(model.forward))


def compile_in_place(model: torch.nn.Module, **settings: Any) -> None:
    """``model.compile(**settings)``, which captures what ``torch.compile(model, **settings)`` does."""
    patch = importlib.import_module("torch._dynamo.config").patch
    with patch(wrap_top_frame=True) if is_skipped(model) else nullcontext():
        model.compile(**settings)


def compiled_settings(model: Any) -> tuple[str | None, dict[str, Any] | None]:
    """mode and options of a model that ``torch.compile(model, backend="quartet", …)`` or ``quartet.compile`` has
    compiled; Nones for any other."""
    in_place = getattr(model, "_compiled_call_impl", None)
    backend = getattr(getattr(model, "dynamo_ctx", None), "callback", None) or (
        in_place and inspect.getclosurevars(in_place).nonlocals.get("callback"))
    while backend is not None and not hasattr(backend, "compiler_name"):
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    if getattr(backend, "compiler_name", None) != "quartet":
        return None, None
    return backend.kwargs.get("mode"), backend.kwargs.get("options")


def dynamo_output() -> Any:
    """What dynamo has made of the code that it is compiling on this thread. Raises AttributeError outside of that."""
    return _load("torch._dynamo.symbolic_convert", "InstructionTranslator").current_tx().output


def compilation_metrics(limit: int) -> list[Any]:
    """What dynamo notes of each function that it has compiled or given up, from now on of so many."""
    _load("torch._dynamo.utils", "set_compilation_metrics_limit")(limit)
    return list(_load("torch._dynamo.utils", "get_compilation_metrics")())


def looks_again() -> Callable[[Any], None]:
    """What lets dynamo compile a function, and run what it has compiled of it, where it leaves that to Python."""
    begin, kind = _load("torch._dynamo.types", "FrameAction").DEFAULT, _load("torch._dynamo.types", "FrameExecStrategy")
    allow, given = _load("torch._C._dynamo.eval_frame", "set_code_exec_strategy"), kind(begin, begin)
    return lambda code: allow(code, given)


def backward_number() -> int | None:
    """Which backward autograd is running on this thread, None outside of all."""
    number = _load("torch._C", "_current_graph_task_id")()
    return None if number == -1 else number


def cutting_wrappers() -> tuple[type[torch.nn.Module], ...]:
    """What data parallelism puts around a module, as ``module``, and whose forward breaks a graph."""
    flat = sys.modules.get("torch.distributed.fsdp")
    return (torch.nn.parallel.DistributedDataParallel, *([] if flat is None else [flat.FullyShardedDataParallel]))


def inside(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module in what torch.compile or data parallelism put around it; None for any other."""
    if isinstance(module, _load("torch._dynamo.eval_frame", "OptimizedModule")):
        return module._orig_mod
    wrapped = isinstance(module, (torch.nn.DataParallel, *cutting_wrappers()))
    return module.get_submodule("module") if wrapped else None


def is_flattened(module: torch.nn.Module) -> bool:
    """Whether FSDP version 1 holds the parameters of a module in a flat one."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def trace(function: Callable[..., Any], inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
    """aten graph of ``function`` on fake inputs, decomposed as far as Inductor wants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    decompositions = _load("torch._inductor.decomposition", "select_decomp_table")()
    with detect_fake_mode(inputs):
        return make_fx(function, decomposition_table=decompositions)(*inputs)


def register_inductor_lowering(op: Any, lower: Callable[[Any, tuple[Any, ...]], Any]) -> None:
    """``lower(graph, operands)`` gives Inductor's IR for ``op``, which is ``graph.current_node`` of the graph that is
    being lowered; it stays a fallback for everybody else."""
    virtualized = _load("torch._inductor.virtualized", "V")

    def lowering(*operands: Any) -> Any:
        return lower(virtualized.graph, operands)

    _load("torch._inductor.lowering", "register_lowering")(op, type_promotion_kind=None)(lowering)


def inline_into_inductor(gm: torch.fx.GraphModule, operands: list[Any]) -> Any:
    """Run an aten graph through the lowering that is in progress; the layout of its results stays open."""
    copy = torch.fx.GraphModule(gm, torch.fx.Graph())
    results = copy.graph.graph_copy(gm.graph, {})
    copy.graph.output(results)
    for result in results if isinstance(results, (list, tuple)) else [results]:
        result.meta["val"] = None  # else Inductor stores it with these strides; 2.11 wants the key
    return _load("torch._inductor.lowering", "process_subgraph_nodes")(copy, operands)


def store_in_inductor(x: Any) -> Any:
    """Inductor IR ``x`` computed into a contiguous buffer of its own."""
    stored = _load("torch._inductor.lowering", "lowerings")[torch.ops.aten.clone.default](x)
    stored.realize()
    order = list(reversed(range(len(stored.get_size()))))
    _load("torch._inductor", "ir").as_storage_and_layout(stored, stride_order=order)  # on a GPU else padded
    return stored
