"""``quartet selftest``: quantisers, inverse rotations and products on each GPU, against the reference on that GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quartet.cli.doctor import table
from quartet.cli.selftest.ops import provided, results
from quartet.cli.selftest.products import NVFP4, NVFP4_TILE, PRODUCTS, Operand, Product, exact
from quartet.kernels import reference
from quartet.kernels.reference.formats.nvfp4 import tensor_scales
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.op import Op, Provider
from quartet.lowering.recipe.types import Gemm, Rotation
from quartet.recipes import recipes
from quartet.runtime.devices import Target

if TYPE_CHECKING:
    from quartet.kernels.triton.quantize.ops import Chain

SHAPES = ((256, 512, 1024), (300, 144, 4096), (1, 48, 96))  # M, N and K of the products
QUANTIZED = ((256, 512), (33, 80), (1, 32))
MANY = (2048, 4096)
DISTANCE = 5e-3  # of a bf16 product from that in fp32, relative to its norm; the rounding alone is 1.7e-3
SIGMAS = 4.0
FEW = 2.0**-5  # of the bytes of providers that add up in another order: signs of zeros; of others one in some millions
RESOLUTION = {"integers": 2.0**-10, "hardware": 2.0**-8}  # steps by which a probability of few bits may be off
SITE = 5

Verdict = tuple[bool, str]


@dataclass(frozen=True)
class Quantizer:
    """A Hadamard transform and a quantiser after it, for the kernels and by the reference."""

    name: str
    spec: QuantSpec
    rotation: Rotation | None = None

    @staticmethod
    def of(name: str, gemm: Gemm | None) -> Quantizer:
        """That of a product's first operand."""
        assert gemm is not None and gemm.a.spec is not None
        return Quantizer(name, gemm.a.spec, gemm.rotation)

    @property
    def size(self) -> int:
        return 0 if self.rotation is None else self.rotation.n

    def signs(self, device: torch.device) -> Tensor | None:
        if self.rotation is None or self.rotation.signs == "none":
            return None
        if self.rotation.signs == "random":
            return reference.random_signs(_seed(device), SITE, self.size)
        return torch.tensor(self.rotation.signs, dtype=torch.float32, device=device)

    def chain(self, x: Tensor) -> Chain:
        """What the kernels take to quantise ``x``."""
        from quartet.kernels.triton.quantize.ops import Chain

        encode = None if (amax := self._amax(x)) is None else tensor_scales(amax, self.spec)[0]
        return Chain(self.spec, self.size, self.signs(x.device), _seed(x.device), SITE, encode)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and mask by the reference."""
        return reference.quantize(self._rotated(x), self.spec, _seed(x.device), SITE, amax=self._amax(x))

    def _rotated(self, x: Tensor) -> Tensor:
        return reference.hadamard(x, self.size, self.signs(x.device)) if self.size else x

    def _amax(self, x: Tensor) -> Tensor | None:
        return reference.largest_magnitude(self._rotated(x)) if self.spec.takes_amax else None


FORWARD = Quantizer.of("nearest", recipes()["quartet"].fprop)
MASKED = Quantizer.of("nearest with mask", recipes()["quartet-paper"].fprop)
STOCHASTIC = Quantizer.of("stochastic", recipes()["quartet"].dgrad)
UNROTATED = replace(STOCHASTIC, rotation=None)
MX = (FORWARD, MASKED, STOCHASTIC)
NV = (Quantizer("NVFP4 nearest", NVFP4), Quantizer("NVFP4 nearest, tiles", NVFP4_TILE),
      Quantizer("NVFP4 stochastic", replace(NVFP4, rounding="stochastic"), Rotation(16)))


@dataclass(frozen=True)
class Check:
    """One kernel on one size.

    Attributes:
        run: says whether the kernel is right, and its worst error in words.
        declined: why the kernel does not run on the device, instead.
    """

    kernel: str
    shape: str
    run: Callable[[], Verdict]
    declined: str | None = None


def selftest(devices: Sequence[torch.device], checks: Callable[[torch.device], Iterable[Check]]) -> tuple[str, bool]:
    """A table of each device's ``checks``, and whether none of them failed and some ran."""
    lines, healthy = [], True
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        rows, good = outcomes(checks(device))
        lines += [f"{device} ({name})", table([("kernel", "shape", "result", "worst error"), *rows])]
        healthy = healthy and good
    return "\n".join(lines), healthy


def outcomes(checks: Iterable[Check]) -> tuple[list[tuple[str, str, str, str]], bool]:
    """(kernel, shape, result, worst error) of each check, and whether none failed and some ran."""
    rows, results = [], set()
    for check in checks:
        if check.declined is not None:
            rows.append((check.kernel, check.shape, "not here", check.declined))
            continue
        try:
            right, worst = check.run()
            result = "right" if right else "WRONG"
        except Exception as error:
            result, worst = "FAILED", f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        rows.append((check.kernel, check.shape, result, worst))
        results.add(result)
    return rows, results == {"right"}


def checks_of(device: torch.device) -> Iterator[Check]:
    """What there is to check on a device: quantisers, folds, products in the order in which they are chosen."""
    from quartet.lowering.targets.triton import lower as cuda

    target = Target.of(device)
    declined = cuda.supports(target, torch.bfloat16, STOCHASTIC.spec, STOCHASTIC.size)
    if declined is not None:
        yield Check("Triton quantisers", "-", _nothing, declined)
    else:
        yield from quantizer_checks(device, QUANTIZED, MANY)
        hardware = target.lacks("block-scaled tensor cores")
        if hardware is not None:
            yield Check("conversions by hardware", "-", _nothing, hardware)
        yield from op_checks(device)
    yield from product_checks(target, device)


def quantizer_checks(device: torch.device, sizes: Sequence[tuple[int, int]], many: tuple[int, int]) -> Iterator[Check]:
    """Of the Triton quantisers, row-major and swizzled, in integers and by the device's conversions, and of what goes
    with them: the fold to E4M3, requantising, the inverse rotation of gradients.

    Args:
        sizes: rows and columns of what is quantised. many: those of what probabilities are estimated from.
    """
    from quartet.kernels.triton.quantize import blackwell

    forms = [("integers", False)] + ([("hardware", True)] if blackwell.conversions(device) else [])
    for rows, cols in sizes:
        at, shape = (device, rows, cols), f"{rows}×{cols}"
        for q in (*MX, *NV):
            yield Check(f"quantise, row-major, {q.name}", shape, partial(_row_major, *at, q))
        for q in MX:
            yield Check(f"quantise, fold to E4M3, {q.name}", shape, partial(_folded, *at, q))
            yield Check(f"requantise, row-major, {q.name}", shape, partial(_requantized, *at, q))
            for name, hardware in forms:
                if not (hardware and q.spec.stochastic):
                    yield Check(f"quantise, swizzled, {q.name}, {name}", shape, partial(_swizzled, *at, q, hardware))
                    yield Check(f"requantise, swizzled, {q.name}, {name}", shape,
                                partial(_requantized_swizzled, *at, q, hardware))
        for q in (FORWARD, MASKED):
            yield Check(f"inverse rotation, {q.name}", shape, partial(_unrotated, *at, q))
    for name, hardware in forms:
        if not hardware or "stochastic" in blackwell.conversions(device):
            yield Check(f"fairness of stochastic, {name}", "{}×{}".format(*many),
                        partial(_fair, device, *many, hardware))


def op_checks(device: torch.device) -> Iterator[Check]:
    """Of every provider of an op that gives the bits of its reference."""
    for op, provider, arguments, declined in provided(device):
        shape = "×".join(map(str, arguments[0].shape)) if declined is None else "-"
        yield Check(f"{op.name}.{provider.name}", shape,
                    partial(_provided, op, provider, arguments), declined)


def product_checks(target: Target, device: torch.device) -> Iterator[Check]:
    """Of the products of quantised operands, in the registry's order."""
    from quartet.lowering.registry import KERNELS

    for kernel in KERNELS:
        for product in PRODUCTS:
            if product.kernel == kernel.name:
                declined = next((reason for spec in (product.a, product.b) if (
                    reason := kernel.supports(target, torch.bfloat16, spec, product.rotation)) is not None), None)
                for m, n, k in SHAPES if declined is None else SHAPES[:1]:
                    shape = f"{m}×{n}×{k}" if declined is None else "-"
                    yield Check(product.name, shape, partial(_product, device, m, n, k, product), declined)


def unfairness(values: Tensor, exact: Tensor, resolution: float) -> tuple[float, int]:
    """How far stochastic rounding is from fair.

    Args:
        values: E2M1 values of a rounding. exact: what was rounded, −6…6.
        resolution: by how many steps of the grid a mean may be off because probabilities have few bits.
    Returns:
        the largest deviation of a mean, of magnitudes with one distance on the grid and a probability within an
        eighth, in standard deviations; how many values are none of the two neighbours.
    """
    a = exact.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    up = a / step - (a / step).floor()
    error = (torch.where(torch.signbit(exact), -values, values) - a) / step
    strangers = (((error + up).abs() > 1e-4) & ((error + up - 1).abs() > 1e-4)).sum()
    worst = 0.0
    for size in (0.5, 1.0, 2.0):
        for eighth in range(8):
            chosen = (step == size) & ((up * 8).floor() == eighth)
            sigma = (up * (1 - up))[chosen].double().sum().sqrt()
            if sigma > 0:
                off = error[chosen].double().sum().abs() - resolution * chosen.sum()
                worst = max(worst, float(off / sigma))
    return worst, int(strangers)


def _nothing() -> Verdict:
    raise AssertionError("a declined check was run")


def _data(device: torch.device, rows: int, cols: int, seed: int = 0) -> Tensor:
    """bf16 rows of several sizes with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x, size = (torch.randn(rows, n, generator=generator, dtype=torch.float32, device="cpu") for n in (cols, 1))
    x *= size.exp()
    x[:, ::37] *= 8
    return x.to(device, torch.bfloat16)


def _seed(device: torch.device) -> Tensor:
    return torch.tensor(-8_765_432_109_876, dtype=torch.int64, device=device)


def _differing(pairs: Iterable[tuple[Tensor, Tensor]], few: float = 0.0) -> Verdict:
    """Whether all bytes are equal but for a share of ``few``."""
    wrong = total = 0
    for got, wanted in pairs:
        if got.shape != wanted.shape:
            return False, f"{list(got.shape)} instead of {list(wanted.shape)}"
        wrong += int((got.view(torch.uint8) != wanted.view(torch.uint8)).sum())
        total += got.numel() * got.element_size()
    return wrong <= few * total, f"{wrong} of {total} bytes differ"


def _provided(op: Op, provider: Provider, arguments: tuple[Any, ...]) -> Verdict:
    return _differing(results(op, provider, arguments), 0.0 if provider.exact else FEW)


def _row_major(device: torch.device, rows: int, cols: int, q: Quantizer) -> Verdict:
    from quartet.kernels.triton.quantize import ops

    x = _data(device, rows, cols)
    got: list[Tensor] = []
    wanted: list[Tensor] = []
    for operand in (x, x.t()):
        got += ops.quantize(operand, q.chain(operand), packed=True, folded=False)[:3]
        wanted += q.quantize(operand)
    if not q.spec.tile:
        got += ops.quantize_both(x, q.chain(x), q.chain(x.t()))
        wanted += [*q.quantize(x)[:2], *q.quantize(x.t())[:2]]
    return _differing(zip(got, wanted, strict=True))


def _folded(device: torch.device, rows: int, cols: int, q: Quantizer) -> Verdict:
    from quartet.kernels.triton.quantize import ops

    x = _data(device, rows, cols)
    *got, values, row_scales = ops.quantize(x, q.chain(x), packed=True, folded=True)
    wanted = q.quantize(x)
    without_gain = QuantSpec(q.spec.element, q.spec.block)
    folded = reference.dequantize(*wanted[:2], without_gain)
    pairs = [*zip(got, wanted, strict=True), (values.float() * row_scales, folded)]
    alone, scales_alone = ops.fold(*wanted[:2], q.spec)
    return _differing([*pairs, (alone.float() * scales_alone, folded)])


def _swizzled(device: torch.device, rows: int, cols: int, q: Quantizer, hardware: bool) -> Verdict:
    from quartet.kernels.triton.quantize import blackwell

    x = _data(device, rows, cols)
    codes, scales, mask = blackwell.quantize(x, q.chain(x), hardware=hardware)
    got = [codes, scales, *blackwell.quantize_both(x, q.chain(x), q.chain(x.t()), hardware=hardware)]
    wanted: list[Tensor] = []
    for operand in (x, x, x.t()):
        codes, scales, _ = q.quantize(operand)
        wanted += [codes, reference.swizzle_scales(scales)]
    if q.spec.mask:
        got.append(mask)
        wanted.append(q.quantize(x)[2])
    return _differing(zip(got, wanted, strict=True))


def _requantized(device: torch.device, rows: int, cols: int, q: Quantizer) -> Verdict:
    """From the codes of forward."""
    from quartet.kernels.triton.quantize import ops

    codes, scales, _ = FORWARD.quantize(_data(device, rows, cols))
    back = reference.dequantize(codes, scales, FORWARD.spec).t()
    got = ops.requantize(codes, scales, FORWARD.spec, q.chain(back))
    return _differing(zip(got, q.quantize(back)[:2], strict=True))


def _requantized_swizzled(device: torch.device, rows: int, cols: int, q: Quantizer, hardware: bool) -> Verdict:
    from quartet.kernels.triton.quantize import blackwell

    codes, scales, _ = FORWARD.quantize(_data(device, rows, cols))
    back = reference.dequantize(codes, scales, FORWARD.spec).t()
    got = blackwell.requantize(codes, reference.swizzle_scales(scales), FORWARD.spec, q.chain(back), hardware=hardware)
    codes, scales, _ = q.quantize(back)
    return _differing(zip(got, (codes, reference.swizzle_scales(scales)), strict=True))


def _unrotated(device: torch.device, rows: int, cols: int, q: Quantizer) -> Verdict:
    """The gradient of what ``q`` quantised, as a product of two stochastic operands leaves it."""
    from quartet.kernels.triton.quantize.rotations import mask_rotate

    codes, _, mask = q.quantize(_data(device, rows, cols))
    gradient, gain = _data(device, rows, codes.shape[1] * 2, 1), STOCHASTIC.spec.gain**2
    dtype = torch.bfloat16 if gradient.is_cuda else torch.float32  # Triton's interpreter rounds bf16 its own way
    got = mask_rotate(gradient, mask if q.spec.mask else None, rotation=q.size, signs=q.signs(device), gain=gain,
                      cols=cols, dtype=dtype)
    scaled = gradient.float() * gain
    kept = reference.apply_mask(scaled, mask) if q.spec.mask else scaled
    wanted = reference.hadamard(kept, q.size, q.signs(device), inverse=True, dtype=dtype)[:, :cols]
    return _differing([(got, wanted.contiguous())])


def _fair(device: torch.device, rows: int, cols: int, hardware: bool) -> Verdict:
    from quartet.kernels.triton.quantize import blackwell

    x = _data(device, rows, cols)
    codes, flat, _ = blackwell.quantize(x, UNROTATED.chain(x), hardware=hardware)
    scales = reference.unswizzle_scales(flat, rows, cols // 32)
    exact = x.float() * reference.e8m0_reciprocal(scales).repeat_interleave(32, 1) * 0.75
    values = reference.e2m1_decode(reference.unpack_nibbles(codes))
    sigmas, strangers = unfairness(values, exact, RESOLUTION["hardware" if hardware else "integers"])
    return sigmas < SIGMAS and not strangers, f"{sigmas:.1f} σ" + f", {strangers} not neighbours" * (strangers > 0)


def _product(device: torch.device, m: int, n: int, k: int, product: Product) -> Verdict:
    a, b = Operand.of(_data(device, m, k, 1), product.a), Operand.of(_data(device, n, k, 2), product.b)
    wanted, got = exact(a, b), product.multiply(a, b)
    if got.shape != wanted.shape:
        return False, f"{list(got.shape)} instead of {list(wanted.shape)}"
    distance = float((got.float() - wanted).norm() / wanted.norm())
    return distance < DISTANCE, f"{distance:.1e}"
