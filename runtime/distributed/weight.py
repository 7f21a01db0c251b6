"""What FSDP2 puts in the place of a weight whose codes it has gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.spec import QuantSpec

aten = torch.ops.aten
_PLANES = ("codes", "scales", "mask", "amax")


@dataclass(frozen=True)
class Packing:
    """How a weight ``[out, in]`` is quantised before it is gathered: rotated in blocks of ``rotation`` along ``in``,
    signs first (0 and None: not at all), then by ``spec``."""

    spec: str
    rotation: int = 0
    signs: tuple[int, ...] | None = None

    @property
    def quantizer(self) -> QuantSpec:
        return QuantSpec.parse(self.spec)

    @property
    def by_tensor(self) -> bool:
        """Whether the largest magnitude of the whole tensor decides, of which each rank knows its part's."""
        return self.quantizer.block == "tensor" or self.quantizer.takes_amax


class GatheredWeight(Tensor):
    """A matrix ``[out, in]`` of which this process has the codes alone, as all ranks together have made them.

    Args:
        planes: ``codes`` and ``scales``, a clip mask where the spec has one, and ``amax`` fp32 ``[1, 1]`` where it
            takes one, as ``quartet::quantize`` returns and takes them.
        packing: what they are. cols: ``in``. dtype: the matrix's, and that of its gradient.

    Compiled code reads it as ``quartet::gathered_weight``, for which the backend puts the codes; nothing else can
    read it. Its gradient is a plain tensor.
    """

    codes: Tensor
    scales: Tensor
    mask: Tensor | None
    amax: Tensor | None  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, planes: dict[str, Tensor], packing: Packing, cols: int, dtype: torch.dtype) -> GatheredWeight:
        codes = planes["codes"]
        return Tensor._make_wrapper_subclass(cls, (codes.shape[0], cols), dtype=dtype, device=codes.device)

    def __init__(self, planes: dict[str, Tensor], packing: Packing, cols: int, dtype: torch.dtype) -> None:
        self.packing, self.cols = packing, cols
        for name in _PLANES:
            setattr(self, name, planes.get(name))

    @property
    def planes(self) -> dict[str, Tensor]:
        """The tensors that it consists of, by name."""
        return {name: plane for name in _PLANES if (plane := getattr(self, name)) is not None}

    def materialise(self) -> Tensor:
        """The matrix, in a graph; elsewhere an error that says who may read it."""
        kind = self.packing
        return torch.ops.quartet.gathered_weight(
            self.codes, self.scales, self.mask, self.amax, kind.spec, kind.rotation,
            None if kind.signs is None else list(kind.signs), self.cols, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredWeight({list(self.shape)}, '{self.packing.spec}', dtype={self.dtype}, device={self.device})"

    # ---- what torch asks of a subclass ---------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return list(self.planes), (self.packing, self.cols, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: tuple[Any, ...], outer_size: Any = None,
                             outer_stride: Any = None) -> GatheredWeight:
        return cls(inner, *meta)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for the cache of AOTAutograd."""
        parts = [(name, t.dtype, tuple(t.shape), t.stride(), t.device) for name, t in self.planes.items()]
        return repr((type(self).__qualname__, *parts, self.packing, self.cols, self.dtype, self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError("a gathered weight lives as long as FSDP keeps it unsharded; save the model's "
                                  "state_dict(), which holds the shards in high precision")

    __torch_function__ = torch.nn.Parameter.__torch_function__  # nothing above autograd

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func, _read)
        return rule(func, args, kwargs or {})


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    return GatheredWeight(w.planes, w.packing, w.cols, w.dtype)


def _strided(func: Any, args: Any, kwargs: Any) -> Any:
    """FSDP2 asks for a strided view of the same matrix."""
    return _same(func, args, kwargs) if list(args[1]) == list(args[0].shape) else _read(func, args, kwargs)


def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """A plain tensor, such as the gradient of what was not used."""
    w, given = args[0], {k: v for k, v in kwargs.items() if v is not None and k != "memory_format"}
    meta = torch.empty(w.shape, dtype=w.dtype, device="meta")
    return func(meta, *args[1:], **({"device": w.device} | given))


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Whatever reads the matrix's numbers reads the op that stands for them."""
    return func(*map(_value, args), **{name: _value(value) for name, value in kwargs.items()})


def _value(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(_value, argument))
    return argument.materialise() if isinstance(argument, GatheredWeight) else argument


_RULES: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default), _same), aten.as_strided.default: _strided,
    **dict.fromkeys((aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default), _like),
}
