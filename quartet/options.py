"""What a user passes to ``torch.compile(…, mode=, options=)``, checked and sorted into ours and Inductor's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from quartet.passes.state import ACCUMULATION
from quartet.policy import AUTO, Policy
from quartet.recipes import PolicyError, did_you_mean
from quartet.runtime.devices import Target

KEYS = ("policy", "dump", "strict", "disable_passes", "disable_kernels", "recompute", "accumulation",
        "reuse_weights", "portable_rounding", "open_attention", "eval")
RECOMPUTE = ("none", "gemm")
AS_TRAINED = "as trained"


class OptionError(ValueError):
    """An option that does not exist or has a wrong value; the message names the nearest legal one."""


@dataclass(frozen=True)
class Options:
    """The options of one compilation.

    Args:
        policy: which matmul gets which recipe; default ``$QUARTET_POLICY`` (recipe name or ``.toml`` file), else
            ``"auto"``, which is ``Policy(where_it_pays=True)``.
        dump: folder for the graphs after each pass; default ``$QUARTET_DUMP``, else None, no dump.
        strict: a matmul that the policy wants quantised and that is left alone is an error.
        disable_passes, disable_kernels: names to leave out.
        recompute: ``"none"`` or ``"gemm"`` overrides the field of every recipe; None leaves it to the recipe.
        target: what kernels are chosen for: None for the devices that hold the tensors; :func:`quartet.explain` sets
            another.
        mode: the mode of torch.compile, as given.
        inductor: what Inductor is told: the options of ``mode``, then those the user gave.
        accumulation: of FP8 tensor cores: ``"fast"``, in their own registers, or ``"promoted"``, to fp32 every 128
            elements.
        reuse_weights: while gradients accumulate, quantise a weight once an optimizer step and not in every forward
            (see ``quartet.runtime.slots.weights``); its codes are kept meanwhile. CUDA graphs quantise every time. A
            write through ``parameter.data`` between two forwards of a step is not seen; write under
            ``torch.no_grad()``.
        portable_rounding: quantise in integer arithmetic where the GPU has conversions of its own (Blackwell), so that
            results are bit-equal on all devices.
        open_attention: write ``scaled_dot_product_attention`` as two matmuls and a softmax, whose op classes are
            ``attention_qk`` and ``attention_pv``; the probabilities are then kept for backward.
        eval: what graphs without a backward compute: ``"as trained"``, with what training quantises, or None, in the
            model's own dtype.
    """

    policy: Policy = field(default_factory=lambda: Policy.coerce(AUTO))
    dump: str | None = None
    strict: bool = False
    disable_passes: tuple[str, ...] = ()
    disable_kernels: tuple[str, ...] = ()
    recompute: str | None = None
    target: Target | None = None
    mode: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict, hash=False)
    accumulation: str = ACCUMULATION[0]
    reuse_weights: bool = True
    portable_rounding: bool = False
    open_attention: bool = False
    eval: str | None = AS_TRAINED

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None, *,
              passes: Sequence[str] = (), kernels: Sequence[str] = ()) -> Options:
        """Options from the two arguments of a backend.

        Args:
            mode: a mode of torch.compile, or None.
            options: our ``KEYS`` and any key of ``torch._inductor.config``; ``-`` and ``_`` are the same.
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
        inductor = _of_mode(mode)
        for name in [name for name in given if name not in KEYS]:
            inductor[name] = _inductor_value(name, given.pop(name))
        return cls(
            policy=_policy(given.get("policy")),
            dump=_dump(given.get("dump")),
            strict=_switch("strict", given.get("strict", False)),
            disable_passes=_names("pass", "disable_passes", given, passes),
            disable_kernels=_names("kernel", "disable_kernels", given, kernels),
            recompute=_recompute(given.get("recompute")),
            accumulation=_accumulation(given.get("accumulation", ACCUMULATION[0])),
            reuse_weights=_switch("reuse_weights", given.get("reuse_weights", True)),
            portable_rounding=_switch("portable_rounding", given.get("portable_rounding", False)),
            open_attention=_switch("open_attention", given.get("open_attention", False)),
            eval=_eval(given.get("eval", AS_TRAINED)),
            mode=mode,
            inductor=inductor,
        )


def _of_mode(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    from quartet.runtime.compat import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise OptionError(f"unknown mode {mode!r}; {did_you_mean(mode, modes)}possible: {', '.join(modes)}")
    return dict(modes[mode])


def _inductor_value(name: str, value: Any) -> Any:
    from quartet.runtime.compat import inductor_config

    known = inductor_config.get_config_copy()
    if name not in known:
        raise OptionError(f"unknown option {name!r}; {did_you_mean(name, (*KEYS, *known))}possible: "
                          f"{', '.join(KEYS)} and any key of torch._inductor.config")
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


def _policy(value: object) -> Policy:
    if value is not None:
        return Policy.coerce(value)
    if not (text := os.environ.get("QUARTET_POLICY")):
        return Policy.coerce(AUTO)
    try:
        return Policy.coerce(text)
    except PolicyError as error:
        raise PolicyError(f"environment variable QUARTET_POLICY: {error}", error.path) from None


def _dump(value: object) -> str | None:
    if value is None:
        return os.environ.get("QUARTET_DUMP") or None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise OptionError(f"option 'dump' is the path of a folder, not {type(value).__name__} {value!r}")
    return os.fspath(value)


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"option {name!r} is True or False, not {type(value).__name__} {value!r}")
    return value


def _recompute(value: object) -> str | None:
    if value is not None and value not in RECOMPUTE:
        raise OptionError(f"option 'recompute' is {value!r}; {did_you_mean(value, RECOMPUTE)}possible: "
                          f"{', '.join(RECOMPUTE)}, or None to leave it to the recipe")
    return None if value is None else str(value)


def _eval(value: object) -> str | None:
    if value is not None and value != AS_TRAINED:
        raise OptionError(f"option 'eval' is {value!r}; possible: {AS_TRAINED!r}, or None to evaluate in the model's "
                          "own dtype")
    return None if value is None else AS_TRAINED


def _accumulation(value: object) -> str:
    if value not in ACCUMULATION:
        raise OptionError(f"option 'accumulation' is {value!r}; {did_you_mean(value, ACCUMULATION)}possible: "
                          f"{', '.join(ACCUMULATION)}")
    return str(value)


def _names(what: str, option: str, given: Mapping[str, Any], legal: Sequence[str]) -> tuple[str, ...]:
    value = given.get(option)
    names = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"option {option!r} is a name or a list of names, not {type(value).__name__} {value!r}")
    for name in names:
        if name not in legal:
            raise OptionError(f"option {option!r}: unknown {what} {name!r}; "
                              f"{did_you_mean(name, legal)}possible: {', '.join(legal) or 'none'}")
    return tuple(sorted(set(names)))
