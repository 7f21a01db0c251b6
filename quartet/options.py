"""What a user passes to ``torch.compile(…, mode=, options=)``, checked and sorted into ours and Inductor's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_origin

from quartet.kernels.files import expanded
from quartet.passes.compilation import UNKEYED, key_of, keyed_by
from quartet.passes.residuals.budget import Budget
from quartet.policy import AUTO, Policy
from quartet.recipes import PolicyError, did_you_mean
from quartet.runtime.devices import Target
from quartet.runtime.streams import ranks_of

if TYPE_CHECKING:
    from quartet.inspect.inspector import Inspector

AS_TRAINED = "as trained"
Known = Mapping[str, Sequence[str]]  # "pass", "kernel" → the names that there are
Check = Callable[[str, Any, Known], Any]  # (option, what the user gave, names) → its value; raises OptionError


class OptionError(ValueError):
    """An option that does not exist or has a wrong value; the message names the nearest legal one."""


def option(default: Any, check: Check, doc: str, **more: Any) -> Any:
    """Declare a field of :class:`Options` as an option of the user's: parsed, documented and in the key of the caches.

    Args:
        default: what it is unless given. check: makes a value of what is given, or of the default.
        doc: what it does. more: further metadata of the field, such as ``UNKEYED``.
    """
    return field(default=default, metadata={"check": check, "doc": doc, **more})


def _switch(name: str, value: object, known: Known) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"option {name!r} is True or False, not {type(value).__name__} {value!r}")
    return value


def _one_of(*legal: str, none: str | None = None) -> Check:
    """One of some words, or None, where ``none`` says what for."""
    def check(name: str, value: object, known: Known) -> str | None:
        if value in legal or (value is None and none is not None):
            return None if value is None else str(value)
        shown = ", ".join(repr(word) if " " in word else word for word in legal)
        raise OptionError(f"option {name!r} is {value!r}; {did_you_mean(value, legal)}possible: {shown}"
                          f"{'' if none is None else f', or None to {none}'}")
    return check


def _names_of(what: str) -> Check:
    """A name of a pass or a kernel, or several."""
    def check(option: str, value: object, known: Known) -> tuple[str, ...]:
        names = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in names):
            raise OptionError(f"option {option!r} is a name or a list of names, not {type(value).__name__} {value!r}")
        legal = known.get(what, ())
        for name in names:
            if name not in legal:
                raise OptionError(f"option {option!r}: unknown {what} {name!r}; "
                                  f"{did_you_mean(name, legal)}possible: {', '.join(legal) or 'none'}")
        return tuple(sorted(set(names)))
    return check


def _policy(name: str, value: object, known: Known) -> Policy:
    if value is not None:
        return Policy.coerce(value)
    if not (text := os.environ.get("QUARTET_POLICY")):
        return Policy.coerce(AUTO)
    try:
        return Policy.coerce(text)
    except PolicyError as error:
        raise PolicyError(f"environment variable QUARTET_POLICY: {error}", error.path) from None


def _folder(name: str, value: object, known: Known) -> str | None:
    where = f"option {name!r}" if value is not None else "environment variable QUARTET_DUMP"
    if value is None and not (value := os.environ.get("QUARTET_DUMP")):
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise OptionError(f"option {name!r} is the path of a folder, not {type(value).__name__} {value!r}")
    try:
        return str(expanded(value))
    except FileNotFoundError as error:
        raise OptionError(f"{where}: {error.strerror}") from None


def _memory(name: str, value: object, known: Known) -> Budget | None:
    if value is None or isinstance(value, Budget):
        return value
    try:
        return Budget.parse(value)
    except ValueError as error:
        raise OptionError(f"option {name!r} is {error}") from None


def _ranks(name: str, value: object, known: Known) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return ranks_of(value)
    except ValueError as error:
        raise OptionError(f"option {name!r} is {error}") from None


def _inspector(name: str, value: object, known: Known) -> Inspector | None:
    from quartet.inspect.inspector import coerce

    try:
        return coerce(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"option {name!r}: {error}") from None


@dataclass(frozen=True)
class Options:
    """The options of one compilation: those of the user, each declared once, and what Inductor is told beside them.

    Args:
        target: what kernels are chosen for: None for the devices that hold the tensors; :func:`quartet.explain` sets
            another.
        mode: the mode of torch.compile, as given.
        inductor: what Inductor is told: the options of ``mode``, then those the user gave.
    """

    policy: Policy = field(default_factory=lambda: Policy.coerce(AUTO), metadata={
        "check": _policy, **keyed_by(lambda options: options.policy.key()),
        "doc": "which matmul gets which recipe; default $QUARTET_POLICY (recipe name or .toml file), else 'auto', "
               "the fastest of 'quartet', 'fp8' and the model's dtype for each layer"})
    dump: str | None = option(
        None, _folder, "folder for the graphs after each pass; default $QUARTET_DUMP, else None, no dump", **UNKEYED)
    strict: bool = option(
        False, _switch, "a matmul that the policy wants quantised and that is left alone is an error")
    disable_passes: tuple[str, ...] = option((), _names_of("pass"), "passes to leave out")
    disable_kernels: tuple[str, ...] = option((), _names_of("kernel"), "kernels to leave out")
    recompute: str | None = option(
        None, _one_of("none", "gemm", none="leave it to the recipe"), "overrides the field of every recipe")
    target: Target | None = None
    mode: str | None = field(default=None, metadata=UNKEYED)
    inductor: dict[str, Any] = field(default_factory=dict, hash=False, metadata=UNKEYED)
    accumulation: str = option(
        "fast", _one_of("fast", "promoted"),
        "of FP8 tensor cores: 'fast', in their own registers, or 'promoted', to fp32 every 128 elements")
    reuse_weights: bool = option(
        True, _switch, "while gradients accumulate, quantise a weight once an optimizer step and not in every forward "
        "(see quartet.runtime.slots.weights); its codes are kept meanwhile. CUDA graphs quantise every time. A write "
        "through parameter.data between two forwards of a step is not seen; write under torch.no_grad()")
    portable_rounding: bool = option(
        False, _switch, "quantise to the bits of the reference, also where the GPU's own conversions (Blackwell) or "
        "sums on its tensor cores (Hopper) are faster, so that results are bit-equal on all devices")
    open_attention: bool = option(
        False, _switch, "write scaled_dot_product_attention as two matmuls and a softmax, whose op classes are "
        "attention_qk and attention_pv; the probabilities are then kept for backward")
    memory: Budget | None = option(
        None, _memory, "what may be kept between forward and backward, within which the fastest is chosen: a share of "
        "what is kept unquantised (0.7), bytes of a graph ('12GiB'), 'least', 'fastest', or 'recipe' (nothing chosen). "
        "By default 0.8 by lossless choices alone, where the device's rates are known and a recipe recomputes products")
    same_bits: tuple[int, ...] | None = option(
        None, _ranks, "the ranks that draw the same random bits, as a ProcessGroup, a DeviceMesh or a list of ranks: "
        "those that share a layer (tensor parallel), so that what they replicate stays equal. By default those of the "
        "mesh of inputs that are DTensors, else each rank draws its own", **UNKEYED)
    inspect: Inspector | None = option(
        None, _inspector, "statistics of operands and gradients: a quartet.inspect.Inspector, or every how many steps "
        "quartet.inspect.default() records them", **keyed_by(lambda options: options.inspect and options.inspect.key()))
    check: str | None = option(
        None, _one_of("finite", none="look at nothing"), "'finite': the first product, of forward or backward, with an "
        "operand or a result that is not finite is an error before the optimizer steps (quartet.inspect.NotFinite)")
    eval: str | None = option(
        AS_TRAINED, _one_of(AS_TRAINED, none="evaluate in the model's own dtype"), "what graphs without a backward "
        "compute: 'as trained', with what training quantises, or None, in the model's own dtype")

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None, *,
              passes: Sequence[str] = (), kernels: Sequence[str] = ()) -> Self:
        """Options from the two arguments of a backend.

        Args:
            mode: a mode of torch.compile, or None.
            options: our own, see :meth:`declared`, and any key of ``torch._inductor.config``; ``-`` and ``_`` are the
                same.
            passes, kernels: the names that ``disable_passes`` and ``disable_kernels`` may hold.

        Raises:
            OptionError: unknown key, mode or name, or a value of a wrong type.
            PolicyError: a policy that cannot be.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is a dict, not {type(options).__name__} {options!r}")
        given: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if not isinstance(key, str):
                raise OptionError(f"an option is named by a string, not {type(key).__name__} {key!r}")
            name = key.replace("-", "_")
            if name in given:
                raise OptionError(f"option {name!r} is given twice, with '-' and with '_'")
            given[name] = value
        own, inductor = cls.declared(), of_mode(mode)
        for name in [name for name in given if name not in own]:
            inductor[name] = _inductor_value(name, given.pop(name), tuple(own))
        known = {"pass": passes, "kernel": kernels}
        values = {name: f.metadata["check"](name, given.get(name, None if f.default is MISSING else f.default), known)
                  for name, f in own.items()}
        return cls(mode=mode, inductor=inductor, **values)

    @classmethod
    def declared(cls) -> dict[str, Field[Any]]:
        """Name → field of each option that a user can give; ``metadata["doc"]`` says what it does."""
        return {f.name: f for f in fields(cls) if "check" in f.metadata}

    def key(self) -> str:
        """All that a compiled graph can depend on, as text, but for Inductor's, which has a key of its own."""
        return key_of(self)


KEYS = tuple(Options.declared())


def of_mode(mode: str | None) -> dict[str, Any]:
    """What a mode of ``torch.compile`` tells Inductor; raises OptionError for one that does not exist."""
    if mode is None:
        return {}
    from quartet.runtime.compat import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise OptionError(f"unknown mode {mode!r}; {did_you_mean(mode, modes)}possible: {', '.join(modes)}")
    return dict(modes[mode])


def _inductor_value(name: str, value: Any, own: tuple[str, ...] = KEYS) -> Any:
    from quartet.runtime.compat import inductor_config

    known = inductor_config.get_config_copy()
    if name not in known:
        raise OptionError(f"unknown option {name!r}; {did_you_mean(name, (*own, *known))}possible: "
                          f"{', '.join(own)} and any key of torch._inductor.config")
    kind = inductor_config.get_type(name)
    if not _fits(value, kind):
        expected = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
        raise OptionError(f"option {name!r} of Inductor is of type {expected}, not {type(value).__name__} {value!r}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type, as far as ``isinstance`` can tell."""
    if kind is type(None):
        return True
    if kind is float and isinstance(value, int):
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    try:
        return isinstance(value, kind)
    except TypeError:
        return True
