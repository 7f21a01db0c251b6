"""What a quantiser does to a tensor, in numbers: the specification of what ``quartet.inspect`` shows.

Of the tensor ``x`` that a quantiser reads, rotated where it is, and of ``q``, what its codes stand for:

    amax, mean, rms    largest magnitude, mean and root mean square of x
    not_finite         share of x that is NaN or infinite; the largest magnitude and the means leave it out
    zeros              share of q that is 0
    underflow          share of the x ≠ 0 of which q is 0
    clipped            share of x beyond the largest magnitude that its scale allows, by more than fp32 rounds
    error              Σ(q − x)² / Σx², which is 1 / SNR
    unfolded           share of MXFP4 blocks that E4M3 with one power-of-two scale a row does not hold exactly; NaN of
                       other formats
    scales             how many blocks (rows, tensors) have a scale in [2^k, 2^(k+1)), k from ``LOWEST`` on; what lies
                       outside is counted at the ends

Everything is computed in fp32, sums in float64, without waiting for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels.element import encode
from quartet.kernels.reference.chains import fold
from quartet.kernels.reference.formats.elements import e2m1_encode
from quartet.kernels.reference.formats.packing import pack_nibbles
from quartet.kernels.reference.products.grouped import group_of, quantize_groups
from quartet.kernels.reference.quantize import dequantize, largest_magnitude, quantize
from quartet.kernels.spec import QuantSpec

COLUMNS = ("amax", "mean", "rms", "not_finite", "zeros", "underflow", "clipped", "error", "unfolded")
LOWEST, BINS = -96, 128  # of the histogram of scales
_ROUNDED = 1 + 2.0**-21  # a scale is a quotient in fp32


@dataclass(frozen=True)
class Quantized:
    """What a quantiser has made of ``[rows, cols]``: codes and scales, by the largest magnitude that it took, with a
    scale for the part of a row in each group that ends at ``ends``."""

    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    amax: Tensor | None = None
    ends: Tensor | None = None

    @staticmethod
    def of(x: Tensor, spec: QuantSpec, seed: Tensor | None = None, site: int = 0, amax: Tensor | None = None,
           ends: Tensor | None = None) -> Quantized:
        """The arguments are those of the quantiser; the largest magnitude is the tensor's own unless given."""
        if ends is not None and spec.block == "row":
            return Quantized(spec, *quantize_groups(x, spec, ends), ends=ends)
        if spec.takes_amax and amax is None:
            amax = largest_magnitude(x)
        codes, scales, _ = quantize(x, spec, seed, site, amax=amax)
        return Quantized(spec, codes, scales, amax)

    def values(self) -> Tensor:
        """What the codes stand for: fp32 ``[rows, padded]``."""
        return self._values(self.codes)

    def largest(self) -> Tensor:
        """The largest magnitude that the scale of each element allows, in the same shape."""
        return self._values(_largest_codes(self.codes, self.spec))

    def steps(self, largest: Tensor) -> Tensor:
        """The scales, one of each block, row or tensor."""
        if self.ends is not None:
            return self.scales * self.spec.gain
        block, rows = self.spec.block, self.codes.shape[0]
        down = int(block) if self.spec.tile else rows if block == "tensor" else 1
        return (largest[::down, :: int(block)] if self.spec.blocked else largest[::down, :1]) / self.spec.max

    def _values(self, codes: Tensor) -> Tensor:
        scales = self.scales
        if self.ends is not None:
            scales = scales[:, group_of(self.ends, codes.shape[1] * (2 if self.spec.packed else 1))]
        return dequantize(codes, scales, self.spec, amax=self.amax)


def operand_statistics(x: Tensor, spec: QuantSpec, seed: Tensor | None = None, site: int = 0,
                       amax: Tensor | None = None, ends: Tensor | None = None) -> Tensor:
    """float64 ``[len(COLUMNS) + BINS]`` of ``[rows, cols]`` that a quantiser reads; the arguments are its own.

    ``ends``: where groups end along the columns, in each of which a row has a scale of its own, or is folded by itself.
    """
    made = Quantized.of(x, spec, seed, site, amax, ends)
    x = x.to(torch.float32)
    cols = x.shape[1]
    q, largest = made.values()[:, :cols], made.largest()
    beyond = x.abs() > largest[:, :cols] * _ROUNDED
    return torch.cat((tensor_statistics(x), torch.stack((
        _share(q == 0), _ratio(((q == 0) & (x != 0)).sum(), (x != 0).sum()), _share(beyond), relative_error(q, x),
        _unfolded(made.codes, made.scales, spec, ends))), _histogram(made.steps(largest))))


def tensor_statistics(x: Tensor) -> Tensor:
    """float64 ``[4]``: amax, mean and rms of what is finite, and the share of what is not."""
    finite = torch.isfinite(x)
    held = torch.where(finite, x.to(torch.float32), 0.0)
    count = finite.sum()
    return torch.stack((largest_magnitude(held).reshape(()).double(), _ratio(held.sum(dtype=torch.float64), count),
                        _ratio(held.square().sum(dtype=torch.float64), count).sqrt(), _share(~finite)))


def relative_error(q: Tensor, x: Tensor) -> Tensor:
    """``Σ(q − x)² / Σx²`` as float64 scalar; 0 where both are all zeros."""
    x = x.to(torch.float32)
    return _ratio((q.to(torch.float32) - x).square().sum(dtype=torch.float64), x.square().sum(dtype=torch.float64))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two tensors of one shape, as float64 scalar; NaN where one of them is all zeros."""
    a, b = a.double().flatten(), b.double().flatten()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def alignment(gate: Tensor, linear: Tensor) -> Tensor:
    """float64 ``[2]``: mean and largest ``|cos(w₁, w₂)|`` over the channels of a gated layer, whose weights are both
    ``[channels, in]``: the precursor of outliers in arXiv 2409.12517."""
    a, b = gate.to(torch.float32), linear.to(torch.float32)
    found = ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).abs().double()
    return torch.stack((found.nanmean(), found.nan_to_num(0.0).amax()))


def _share(of: Tensor) -> Tensor:
    return of.sum().double() / max(of.numel(), 1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` in float64, 0 for 0/0."""
    a, b = a.double(), b.double()
    return torch.where((a == 0) & (b == 0), 0.0, a / b)


def _largest_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of the largest magnitude in the layout of ``codes``."""
    largest = torch.full((1, 2 if spec.packed else 1), spec.max, dtype=torch.float32, device=codes.device)
    most = pack_nibbles(e2m1_encode(largest)) if spec.packed else encode(largest, spec.format)
    return most.expand(codes.shape[0], codes.shape[1]).contiguous()


def _unfolded(codes: Tensor, scales: Tensor, spec: QuantSpec, ends: Tensor | None) -> Tensor:
    if not (spec.packed and spec.scale == "e8m0") or spec.tile:
        return torch.full((), float("nan"), dtype=torch.float64, device=codes.device)
    folded, row = fold(codes, scales, spec, ends)
    row = row if ends is None else row[:, group_of(ends, folded.shape[1])]
    exact, held = dequantize(codes, scales, spec) / spec.gain, folded.to(torch.float32) * row
    same = (held == exact) | (held.isnan() & exact.isnan())
    return _share(~same.reshape(codes.shape[0], -1, int(spec.block)).all(-1))


def _histogram(steps: Tensor) -> Tensor:
    exponent = torch.frexp(steps.flatten())[1].long() - 1
    at = torch.where(torch.isfinite(steps.flatten()), exponent - LOWEST, BINS - 1).clamp(0, BINS - 1)
    return torch.zeros(BINS, dtype=torch.float64, device=steps.device).scatter_add_(0, at, torch.ones_like(at).double())
