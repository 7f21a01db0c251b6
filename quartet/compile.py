"""``quartet.compile``: a model that trains in low precision wherever it is called, without being another model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from quartet.options import OptionError, Options, of_mode
from quartet.policy import Policy
from quartet.runtime import compat
from quartet.runtime.in_place import inside_wrappers, refuse_sharded

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model, policy: Any = None, *, mode: str | None = None, fullgraph: bool = False,
            dynamic: bool | None = None, **options: Any) -> Model:
    """Compile a model in place: ``model(…)`` runs compiled from now on, and the model stays what it is.

    Its class, its methods and the keys of its ``state_dict`` do not change, so trainers, checkpoints and ``generate``
    take it as before. Nothing is compiled before it is called. The code that was compiled is not copied with the model:
    a deep copy or an unpickled model is not compiled. Called again, the last call counts.

    Args:
        model: the model, or a part of it such as a block.
        policy: as ``options={"policy": …}`` of ``torch.compile``: a recipe's name, a :class:`quartet.Policy`, a
            TOML file; None for ``$QUARTET_POLICY``, else what pays on the device.
        mode: as for ``torch.compile``; options may be given with it.
        fullgraph: as for ``torch.compile``.
        dynamic: as for ``torch.compile``.
        options: see :class:`quartet.options.Options`, and any key of ``torch._inductor.config``.
    Returns:
        ``model`` itself.
    Raises:
        TypeError: not a module, one that ``torch.compile`` returned, or a layer of ``torch.nn`` itself under
            ``fully_shard``.
        OptionError, PolicyError: an option or a policy that does not exist; the message names the nearest.
    """
    from quartet.lowering import registry
    from quartet.model.left import expect
    from quartet.passes import pipeline
    from quartet.policy.recipes import quantizes

    _check(model, options)
    given = {**of_mode(mode), **options} | ({} if policy is None else {"policy": Policy.coerce(policy)})
    parsed = Options.parse(None, given, passes=pipeline.OPTIONAL, kernels=registry.disableable())
    compat.compile_in_place(inside_wrappers(model), backend="quartet", options=given, fullgraph=fullgraph,
                            dynamic=dynamic)
    if quantizes(parsed.policy):
        expect(model, parsed.strict)
    return model


def _check(model: Any, options: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quartet.compile takes an nn.Module, not {type(model).__name__}; for a function: "
                        'torch.compile(function, backend="quartet", options={"policy": …})')
    if compat.is_wrapped(model):
        raise TypeError("quartet.compile was given what torch.compile returned; give it the model itself, instead of "
                        "torch.compile")
    refuse_sharded(model)
    for name, instead in (("options", "quartet.compile(model, policy, strict=True, …)"),
                          ("backend", "which is 'quartet'; for another one: model.compile(backend=…)")):
        if name in options:
            raise OptionError(f"quartet.compile takes no argument {name!r}: {instead}")
