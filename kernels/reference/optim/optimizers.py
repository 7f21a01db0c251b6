"""One optimizer step, exactly: the specification of ``quartet.optim`` in fp32 tensor arithmetic.

Every product and sum is rounded on its own (no fused multiply-add), so that all kernels can be bit-equal. What depends
on the step number alone is computed in float64, in the order of :func:`coefficients`, and rounded to fp32 once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.kernels.reference.optim.states import Layout, code_dtype, decode, encode, scale_shape, tensor_scale
from quartet.kernels.reference.philox import philox4x32

ALGORITHMS = ("adam", "lion", "sgd")
WEIGHT_GROUP = 8  # elements whose 16 random bits come from one Philox call
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Kind:
    """What is compiled: the algorithm and the storage of its states.

    Args:
        algorithm: one of ``ALGORITHMS``. formats: of each state in order, the master weights last.
        signed: whether each state takes both signs. master: whether the last state is the master weights.
        nesterov: of ``sgd``. stochastic: whether bfloat16 weights are rounded stochastically.
        share: whether weight decay goes through the gradient (Adam, SGD), not to the weights (AdamW, Lion).
    """

    algorithm: str
    formats: tuple[StateFormat, ...]
    signed: tuple[bool, ...]
    master: bool = False
    nesterov: bool = False
    stochastic: bool = False
    share: bool = False

    @property
    def moments(self) -> int:
        """How many of the states are not the master weights."""
        return len(self.formats) - self.master

    @property
    def tile(self) -> int:
        """Elements that are processed together: the block of the states that have one."""
        return next((f.tile for f in self.formats if f.block), 256)

    @property
    def per_tensor(self) -> bool:
        """Whether a state has one scale a tensor."""
        return any(f.per_tensor for f in self.formats)


@dataclass(frozen=True)
class Hyper:
    """Numbers of a parameter group, as Python floats: the learning rate may come as a tensor instead.

    ``beta1`` and ``beta2`` are the momentum and 1 − dampening of ``sgd``.
    """

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False


def check(kind: Kind, layout: Layout, param: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor | None]) -> None:
    """Whether a kernel that is given these tensors' addresses stays inside of them; arguments as of :func:`update`.

    Raises:
        ValueError: a tensor of another size, dtype or device, with gaps, or whose memory was freed.
    """
    if layout.tile != kind.tile or not len(codes) == len(scales) == len(kind.formats):
        raise ValueError(f"{len(codes)} states with {len(scales)} scales in tiles of {layout.tile} are not those of "
                         f"{kind}")
    elements = layout.rows * layout.width
    parts: list[tuple[str, Tensor | None, int, torch.dtype]] = [("a parameter", param, elements, param.dtype)]
    for at, (form, code, scale) in enumerate(zip(kind.formats, codes, scales, strict=True)):
        shape = scale_shape(form, layout)
        parts.append((f"state {at}", code, elements, code_dtype(form)))
        parts.append((f"the scales of state {at}", scale, 0 if shape is None else math.prod(shape), torch.float32))
    for what, x, count, dtype in parts:
        if x is None and not count:
            continue
        if x is None or x.numel() != count or x.dtype is not dtype or x.device != param.device:
            found = "missing" if x is None else f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"{what} of {layout.rows} rows and {layout.width} columns is {count} elements of {dtype} "
                             f"on {param.device}, not {found}")
        if not x.is_contiguous() or x.untyped_storage().nbytes() < (x.storage_offset() + count) * x.element_size():
            raise ValueError(f"{what} of shape {list(x.shape)} is not contiguous, or its memory was freed")


def power(base: float, n: int) -> float:
    """``base ** n`` by squaring, in float64 and in an order that every kernel repeats; n below 2^24."""
    result = 1.0
    for bit in range(24):
        if n >> bit & 1:
            result = result * base
        base = base * base
    return result


def coefficients(kind: Kind, hyper: Hyper, step: int, grad_scale: float = 1.0) -> tuple[float, ...]:
    """Nine float64 numbers of step ``step`` = 1, 2, …; the kernels round them to fp32.

    Returns:
        gradient factor, weight factor, share of the weight added to the gradient, three of the algorithm's averages,
        −step size, 1 / √(1 − β₂ᵗ), eps. The averages are 1 − β₁, β₂, 1 − β₂ of ``adam``; 1 − β₁, 1 − β₂, 0 of ``lion``;
        momentum, 1 − dampening, momentum of ``sgd``, with 0 and 1 for the first two at its first step.
    """
    lr, decay = float(hyper.lr), hyper.weight_decay
    gradient = (-1.0 if hyper.maximize else 1.0) / grad_scale
    weight, share = (1.0 - lr * decay, 0.0) if not kind.share else (1.0, decay)
    b1, b2 = hyper.beta1, hyper.beta2
    if kind.algorithm == "adam":
        return (gradient, weight, share, 1.0 - b1, b2, 1.0 - b2, -(lr / (1.0 - power(b1, step))),
                1.0 / math.sqrt(1.0 - power(b2, step)), hyper.eps)
    if kind.algorithm == "lion":
        return gradient, weight, share, 1.0 - b1, 1.0 - b2, 0.0, -lr, 1.0, hyper.eps
    first = step == 1
    return gradient, weight, share, 0.0 if first else b1, 1.0 if first else b2, b1, -lr, 1.0, hyper.eps


def moments(kind: Kind, c: Sequence[float], p: Tensor, g: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The new values of the states other than the master weights, of fp32 tiles; ``c``: :func:`coefficients`."""
    g = gradient(kind, c, p, g)
    if kind.algorithm == "adam":
        m, v = states
        return (g - m) * c[3] + m, g * c[5] * g + v * c[4]
    if kind.algorithm == "lion":
        return ((g - states[0]) * c[4] + states[0],)
    return (states[0] * c[3] + g * c[4],) if states else ()


def gradient(kind: Kind, c: Sequence[float], p: Tensor, g: Tensor) -> Tensor:
    """The gradient as the averages take it: unscaled, negated to maximise, with its share of the weight."""
    g = g * c[0]
    return g + p * c[2] if kind.share else g


def weights(kind: Kind, c: Sequence[float], p: Tensor, g: Tensor, old: Sequence[Tensor],
            new: Sequence[Tensor]) -> Tensor:
    """The new weights in fp32, from the old and new values of the states; the order of the operations is the rule."""
    g = gradient(kind, c, p, g)
    p = p * c[1]
    if kind.algorithm == "adam":
        m, v = new
        root = v.to(torch.float64).sqrt().to(torch.float32)  # the vector library's own fp32 root may be an ulp off
        return p + m * c[6] / (root * c[7] + c[8])
    if kind.algorithm == "lion":
        direction = (g - old[0]) * c[3] + old[0]
        return p + torch.where(direction > 0, c[6], torch.where(direction < 0, -c[6], direction * 0.0))
    if not new:
        return p + g * c[6]
    return p + (new[0] * c[5] + g if kind.nesterov else new[0]) * c[6]


def random_halves(seed: int, site: int, step: int, first_group: int, count: int) -> Tensor:
    """16 random bits for each of ``count`` elements (a multiple of 8), int64; 8i + j is of group ``first_group`` + i.

    Philox of key ``seed`` and counter (group low, group high, ``site``, ``step``); its word w serves j = 2w in the low
    half and j = 2w + 1 in the high half.
    """
    group = torch.arange(count // WEIGHT_GROUP, device="cpu") + first_group
    zero = torch.zeros_like(group)
    key = zero[:1] + (seed & _LOW), zero[:1] + (seed >> 32 & _LOW)
    words = philox4x32((group & _LOW, (group >> 32) & _LOW, zero + site, zero + step), key)
    return torch.stack([w >> s & 0xFFFF for w in words for s in (0, 16)], -1).reshape(-1)


def round_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """bfloat16 of fp32 ``x``: away from zero with the probability of the part cut off, in steps of 2^−16; NaN stays."""
    bits = (x.view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(x == x, bits.view(torch.float32), x).to(torch.bfloat16)


def unpacked(kind: Kind, layout: Layout, codes: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
    """fp32 tiles of the states. Shapes of ``codes`` and ``scales``: :func:`quartet.kernels.reference.optim.states`."""
    found = []
    for form, signed, code, scale in zip(kind.formats, kind.signed, codes, scales, strict=True):
        if form.plain or form.per_tensor:
            tiles = layout.split(decode(code.reshape(1, -1), scale if scale is None else scale[0], form, signed))
        else:
            padded = torch.nn.functional.pad(code.reshape(layout.rows, layout.width),
                                             (0, layout.tiles * layout.tile - layout.width))
            assert scale is not None
            tiles = decode(padded.reshape(layout.total, layout.tile), scale.reshape(layout.total, -1), form, signed)
            tiles = layout.split(layout.join(tiles))  # the padding decodes to anything
        found.append(tiles)
    return found


def store(kind: Kind, layout: Layout, at: int, x: Tensor, codes: Tensor, scale: Tensor | None) -> None:
    """Encode fp32 tiles as state ``at`` into its tensors, whose scale a tensor is set already."""
    form = kind.formats[at]
    made, scales = encode(x, form, kind.signed[at], scale[0] if scale is not None and form.per_tensor else None)
    codes.copy_(layout.join(made).reshape(codes.shape))
    if scale is not None and scales is not None and not form.per_tensor:
        scale.copy_(scales.reshape(scale.shape))
    if scale is not None and form.per_tensor:
        scale[1] = x.abs().max() if form.scaling == "delayed" else 0.0


def next_scale(scale: Tensor, form: StateFormat) -> Tensor:
    """Scale to encode with, from ``[2]`` (old scale, largest magnitude): the old one, or 1, if that is not usable."""
    amax = scale[1]
    usable = (amax > 0) & (amax < float("inf"))
    kept = torch.where(scale[0] > 0, scale[0], 1.0)
    return torch.where(usable, tensor_scale(torch.where(usable, amax, 1.0), form), kept)


def measure(kind: Kind, layout: Layout, c: Sequence[float], param: Tensor, grad: Tensor, codes: Sequence[Tensor],
            scales: Sequence[Tensor | None]) -> None:
    """The first pass of a scale a tensor: where its largest magnitude is not known (0), take this step's.

    Args: as :func:`update`.
    """
    p, g = layout.split(param), layout.split(grad)
    old = unpacked(kind, layout, codes, scales)
    new = moments(kind, c, old[-1] if kind.master else p, g, old[:kind.moments])
    for form, x, scale in zip(kind.formats, new, scales, strict=False):
        if scale is not None and form.per_tensor and (form.scaling == "current" or scale[1] == 0):
            scale[1] = x.abs().max()


def update(kind: Kind, layout: Layout, c: Sequence[float], param: Tensor, grad: Tensor, codes: Sequence[Tensor],
           scales: Sequence[Tensor | None], random: tuple[int, int, int, int] | None = None) -> None:
    """One step of one parameter, in place.

    Args:
        layout: how the tensors fall into tiles. c: :func:`coefficients`, fp32 numbers.
        param, grad: float32, bfloat16 or float16, contiguous, of ``rows · width`` elements.
        codes, scales: of each state of ``kind``; a scale a tensor is ``[2]``, (scale, largest magnitude).
        random: seed, site, step and first group of :func:`random_halves`, needed if ``kind.stochastic``.
    """
    p, g = layout.split(param), layout.split(grad)
    old = unpacked(kind, layout, codes, scales)
    if kind.master:
        p = old[-1]
    new = moments(kind, c, p, g, old[:kind.moments])
    w = weights(kind, c, p, g, old, new)
    for at, x in enumerate((*new, w) if kind.master else new):
        scale = scales[at]
        if scale is not None and kind.formats[at].per_tensor:
            scale[0] = next_scale(scale, kind.formats[at])
        store(kind, layout, at, x, codes[at], scale)
    if kind.stochastic:
        assert random is not None
        w = round_stochastic(w, random_halves(*random, w.numel()).reshape(w.shape))
    param.copy_(layout.join(w).to(param.dtype).reshape(param.shape))
