"""The parameter type: packed codes and scales that look like a matrix of the model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.optim import lowbit
from quartet.kernels.reference.optim.lowbit import Grid
from quartet.runtime.direct.flat import Flat
from quartet.runtime.direct.linear import linear
from quartet.runtime.optim.layout import local

aten = torch.ops.aten
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_STORED = ("codes", "scale", "bits", "cols", "paper", "activations")


class LowBitWeight(Tensor):
    """A matrix ``[out, in]`` of which only integer codes and fp32 scales exist.

    Args:
        codes: ``[out, ceil(in · width / 8)]`` of :func:`quartet.kernels.reference.optim.lowbit.pack`.
        scale: fp32 ``[out]``, or ``[1]`` under the paper's rule.
        bits: name of the grid. cols: ``in``. dtype: what the matrix says its dtype is, which is that of its gradient
            and follows ``model.bfloat16()``; the codes and scales do not.
        paper: ``code / scale`` instead of ``code · scale``. activations: ``"int8"`` or None, see :mod:`.linear`.

    ``padded_rows``: how many its memory has from its first on, if it was made of zeros, as FSDP2 pads shards; else 0.
    """

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, bits: str, cols: int, dtype: torch.dtype, paper: bool = False,
                activations: str | None = "int8", requires_grad: bool = False) -> LowBitWeight:
        return Tensor._make_wrapper_subclass(cls, (codes.shape[0], cols), dtype=dtype, device=codes.device,
                                             requires_grad=requires_grad)

    def __init__(self, codes: Tensor, scale: Tensor, bits: str, cols: int, dtype: torch.dtype, paper: bool = False,
                 activations: str | None = "int8", requires_grad: bool = False) -> None:
        self.codes, self.scale = codes, scale
        self.bits, self.cols, self.paper, self.activations = bits, cols, paper, activations
        self.padded_rows = 0

    @classmethod
    def of(cls, weight: Tensor, bits: str | int, paper: bool = False,
           activations: str | None = "int8") -> LowBitWeight:
        """The nearest low-bit weight of a matrix.

        Raises:
            ValueError: not a matrix of finite floating-point numbers.
        """
        if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta or not weight.numel():
            raise ValueError(f"a low-bit weight is made of a matrix of numbers, not of {weight.dtype} "
                             f"{list(weight.shape)} on {weight.device}")
        grid, x = lowbit.grid_of(bits), weight.detach().to(torch.float32)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"a weight of shape {list(weight.shape)} has NaNs or infinities; no grid holds them")
        scale = lowbit.first_scale(x, grid, paper)
        codes = lowbit.pack(lowbit.nearest(x, scale, grid, paper), grid)
        return cls(codes, scale, grid.name, x.shape[1], weight.dtype, paper, activations)

    @property
    def grid(self) -> Grid:
        return lowbit.GRIDS[self.bits]

    def unpacked(self) -> Tensor:
        """int8 codes ``[out, in]``."""
        return lowbit.unpack(self.codes, self.grid, self.cols)

    def dequantize(self) -> Tensor:
        """fp32 ``[out, in]``."""
        return lowbit.values(self.unpacked(), self.scale, self.paper)

    def row_steps(self) -> Tensor:
        """fp32 distance of neighbouring values, ``[out]`` or ``[1]``."""
        return 1.0 / self.scale if self.paper else self.scale

    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def with_(self, codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None,
              padded_rows: int = 0) -> LowBitWeight:
        """Another weight of the same kind."""
        made = LowBitWeight(codes, scale, self.bits, self.cols, dtype or self.dtype, self.paper, self.activations)
        made.padded_rows = padded_rows
        return made

    def padded(self) -> LowBitWeight:
        """The weight with the rows that pad it, of which all ranks have as many."""
        if self.padded_rows <= self.shape[0]:
            return self
        codes = self.codes.as_strided((self.padded_rows, self.codes.shape[1]), self.codes.stride())
        return self.with_(codes, self.scale if self.paper else self.scale.as_strided((self.padded_rows,), (1,)))

    def first(self, rows: int) -> LowBitWeight:
        """A view of the first rows."""
        codes, scale = self.codes, self.scale
        if rows < self.shape[0]:
            codes, scale = codes[:rows], scale if self.paper else scale[:rows]
        return self.with_(codes, scale, padded_rows=self.padded_rows)

    def kind(self) -> tuple[Any, ...]:
        """What two weights must share for one to be copied into the other."""
        return tuple(self.shape), self.bits, self.paper, self.activations

    def described(self) -> str:
        """Its kind in words, as errors name it."""
        return (f"shape {list(self.shape)}, bits {self.bits}" + ", paper" * self.paper
                + f", activations {self.activations}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rule = ", paper" if self.paper else ""
        return (f"LowBitWeight({list(self.shape)}, bits={self.bits}{rule}, dtype={self.dtype}, device={self.device}, "
                f"requires_grad={self.requires_grad})")

    # ---- what torch asks of a subclass ---------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", "scale"], (self.bits, self.cols, self.dtype, self.paper, self.activations)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: tuple[Any, ...], outer_size: Any = None,
                             outer_stride: Any = None) -> LowBitWeight:
        return cls(inner["codes"], inner["scale"], *meta)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for the cache of AOTAutograd."""
        parts = [(t.dtype, tuple(t.shape), t.stride(), t.device) for t in (self.codes, self.scale)]
        return repr((type(self).__qualname__, *parts, *self.__tensor_flatten__()[1], self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        data = (self.codes, self.scale, self.bits, self.cols, self.dtype, self.paper, self.activations,
                self.requires_grad, isinstance(self, torch.nn.Parameter))
        return rebuild, data

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Iterable[type], args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func == _SET_DATA:
            return _set_data(*args)
        if func is Tensor.share_memory_:
            raise NotImplementedError("a low-bit weight cannot be moved to shared memory: a step replaces codes and "
                                      "scales together, which processes that share them would see torn apart; give "
                                      "each process a copy, or train with DistributedDataParallel")
        with torch.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RULES:
            if func.namespace == "c10d":
                raise NotImplementedError(
                    f"{func} does not take low-bit weights: what they are is in weight.codes and weight.scale. "
                    "DistributedDataParallel(model) and quartet.direct.broadcast(model) send both")
            if getattr(func, "_schema", None) is not None and func._schema.is_mutable:
                raise NotImplementedError(
                    f"{func} writes to a low-bit weight, which has no high-precision copy to write to. If an optimizer "
                    "called it: quartet.direct.Optimizer(torch.optim.AdamW(model.parameters()))")
            raise NotImplementedError(
                f"{func} is not defined on a low-bit weight; use torch.nn.functional.linear, or weight.dequantize() "
                "for a matrix of numbers")
        return _RULES[func](func, args, kwargs)

    # ---- FSDP2 ---------------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Codes and scales are what travels: FSDP gathers them, not numbers.

        Where rows do not divide by the ranks, FSDP takes tensors of any shape from an extension that asks for the mesh
        alone. From one that asks for sizes too it takes those of the padded shard's, which codes do not have
        (``FSDPParam.all_gather_inputs``).
        """
        padded = self.padded()
        return (padded.codes, padded.scale), self.scale

    def fsdp_post_all_gather(self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *,
                             out: Tensor | None = None) -> Any:
        """The gathered weight, of whose rows FSDP takes as many as there are (:func:`_first_rows`).

        A group of one rank gathers nothing: FSDP passes on the first tensor, the codes, alone, and the scales are those
        of the shard, which is the whole (``metadata``)."""
        codes, *gathered = outputs
        scale = gathered[0] if gathered else metadata.clone()
        scale = scale.amax(0, keepdim=True) if self.paper else scale  # of equal ones, or a NaN of some rank
        if out is None:
            return self.with_(codes, scale, param_dtype), outputs
        if not gathered or self.paper:
            whole: Any = local(out)
            whole.scale = scale
        return None


def rebuild(codes: Tensor, scale: Tensor, bits: str, cols: int, dtype: torch.dtype, paper: bool,
            activations: str | None, requires_grad: bool, parameter: bool) -> Tensor:
    """A pickled weight."""
    weight = LowBitWeight(codes, scale, bits, cols, dtype, paper, activations)
    return torch.nn.Parameter(weight, requires_grad) if parameter else weight.requires_grad_(requires_grad)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, LowBitWeight):
        raise TypeError("a low-bit weight is the second argument of linear; the first and the bias are plain tensors")
    return linear(input, weight, bias)


def _set_data(target: LowBitWeight, source: Tensor) -> None:
    """``target.data = source``: torch takes over shape and dtype only."""
    if not isinstance(source, LowBitWeight):
        raise TypeError(f"the data of a low-bit weight of {target.described()} cannot become a plain {source.dtype} "
                        f"tensor {list(source.shape)}; LowBitWeight.of(tensor, bits) makes a low-bit one of it")
    with torch.DisableTorchFunctionSubclass():
        target.data = source
    for name in _STORED:
        setattr(target, name, getattr(source, name))


# ---- operators -----------------------------------------------------------------------------------------------------

_RULES: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}
Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _implements(*ops: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


@_implements(aten.detach.default, aten.clone.default, aten.alias.default)
def _same(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    own = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return w.with_(func(w.codes, **own), func(w.scale, **own),
                   padded_rows=0 if func is aten.clone.default else w.padded_rows)


@_implements(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    dtype = kwargs.get("dtype") or w.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"a low-bit weight says to be of a floating-point dtype, not {dtype}; weight.unpacked() has "
                        "its codes as int8")
    move = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking") and v is not None}
    padded = w.padded()
    moved = w.with_(padded.codes.to(copy=True, **move), padded.scale.to(copy=True, **move), dtype, w.padded_rows)
    return moved.first(w.shape[0])


@_implements(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
             aten.rand_like.default, aten.randn_like.default)
def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """A plain tensor, as the states of an optimizer are."""
    w = args[0]
    meta = torch.empty(w.shape, dtype=w.dtype, device="meta")
    own = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return func(meta, *args[1:], **({"device": w.device} | {k: v for k, v in own.items() if v is not None}))


@_implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return func(args[0].codes)


@_implements(aten.copy_.default)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, LowBitWeight):
        raise ValueError(f"a low-bit weight of {source.described()} cannot be copied into a plain {target.dtype} "
                         f"tensor {list(target.shape)}: convert the model first (quartet.direct.convert with the same "
                         "bits=, paper= and activations=), fill it by quartet.direct.load(model, state), or copy "
                         "weight.dequantize()")
    if problem := mismatch(target, source):
        raise ValueError(problem)
    target.codes.copy_(source.codes, *args[2:])
    target.scale.copy_(source.scale, *args[2:])
    return target


def mismatch(target: LowBitWeight, source: Tensor) -> str | None:
    """Why ``source`` cannot take the place of a low-bit weight, and what to do; None where it can."""
    if not isinstance(source, LowBitWeight):
        return (f"a plain {source.dtype} tensor {list(source.shape)} cannot become a low-bit weight of "
                f"{target.described()}: load numbers before quartet.direct.convert, or convert them first by "
                "LowBitWeight.of")
    if target.kind() != source.kind():
        return (f"a low-bit weight of {source.described()} cannot be copied into one of {target.described()}; "
                "convert the model with the same bits=, paper= and activations=, or fill it by "
                "quartet.direct.load(model, state), which takes those of the state")
    return None


def _scales(w: LowBitWeight, cut: Callable[[Tensor], Any], pieces: int | None = None) -> Any:
    """Scales cut along rows like the codes; the paper's one scale goes with every piece."""
    if not w.paper:
        return cut(w.scale)
    return w.scale if pieces is None else [w.scale.clone() for _ in range(pieces)]


@_implements(aten.split.Tensor)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    w, size = args[0], args[1]
    _rows_only(func, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    codes = func(w.codes, size)
    scales = _scales(w, lambda s: func(s, size), len(codes))
    return [w.with_(c, s) for c, s in zip(codes, scales, strict=True)]


@_implements(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    _rows_only(func, args[1] if len(args) > 1 else 0)
    rows = range(w.shape[0])[slice(*args[2:])]
    if (rows.start, rows.step) == (0, 1):
        return w.first(len(rows))
    return w.with_(func(w.codes, *args[1:]), _scales(w, lambda s: func(s, *args[1:])))


def _rows_only(func: Any, dim: int) -> None:
    if dim not in (0, -2):
        raise ValueError(f"{func} would cut a low-bit weight across its rows; only dimension 0 can be cut or sharded")


@_implements(aten.new_zeros.default, aten.new_empty.default)
def _new(func: Any, args: Any, kwargs: Any) -> Any:
    w, size = args[0], args[1]
    own = {k: v for k, v in kwargs.items() if v is not None and k != "dtype"}
    if len(size) != 2 or size[1] != w.cols:
        return func(w.codes, size, dtype=kwargs.get("dtype") or w.dtype, **own)
    codes = func(w.codes, (size[0], w.codes.shape[1]), **own)
    return w.with_(codes, func(w.scale, (1 if w.paper else size[0],), **own), kwargs.get("dtype"), padded_rows=size[0])


@_implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The matrix itself, or what DistributedDataParallel and FSDP2 make of it before they send it."""
    w, size = args[0], list(args[1])
    if size in ([-1], [w.numel()]):
        return Flat([w])
    if size != list(w.shape):
        raise ValueError(f"a low-bit weight of shape {list(w.shape)} has no view of shape {size}")
    return w.first(w.shape[0])


@_implements(aten.as_strided.default)
def _first_rows(func: Any, args: Any, kwargs: Any) -> Any:
    """FSDP2 asks for the matrix without the rows that pad it to a multiple of its ranks."""
    w, size, stride = args[0], list(args[1]), list(args[2])
    if len(size) != 2 or size[0] > w.shape[0] or size[1] != w.cols or stride != [w.cols, 1]:
        raise ValueError(f"a low-bit weight of shape {list(w.shape)} has no view of shape {size}, strides {stride}")
    return w.first(size[0])


def components(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The stored tensors of several low-bit weights."""
    return [part for t in tensors if isinstance(t, LowBitWeight) for part in (t.codes, t.scale)]


torch.serialization.add_safe_globals([LowBitWeight, rebuild])
