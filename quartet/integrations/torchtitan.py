"""For torchtitan: models with FlexAttention under ``--compile.backend quartet``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def accept_backend() -> None:
    """Let torchtitan compile models with FlexAttention with this backend, which lowers it as Inductor does.

    torchtitan refuses every backend for them but two, since others would run FlexAttention without its kernel.

    Raises:
        ImportError: this torchtitan does not have the function that refuses.
    """
    from torchtitan.distributed import compile as titan

    refusing: Callable[..., Any] | None = getattr(titan, "_maybe_regional_inductor_backend", None)
    if refusing is None:
        raise ImportError("torchtitan.distributed.compile has no _maybe_regional_inductor_backend; tested with "
                          "torchtitan 0.3.0")
    if getattr(refusing, "accepts_quartet", False):
        return

    def choose(model: Any, backend: Any) -> Any:
        return backend if backend == "quartet" else refusing(model, backend)

    choose.accepts_quartet = True  # type: ignore[attr-defined]
    titan._maybe_regional_inductor_backend = choose
