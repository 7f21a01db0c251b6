"""The block-scaled matrix product on a GPU: tensors in, a tensor out."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from quartet.kernels.cutlass.configuration import (
    ARCH_OF_CAPABILITY,
    BLOCK,
    ELEMENT_BITS,
    Configuration,
    ConfigurationError,
    arch_of,
    supports,
)
from quartet.kernels.cutlass.library import Library, Problem, load
from quartet.kernels.cutlass.selection import Product, select
from quartet.kernels.reference.formats.packing import swizzled_size
from quartet.kernels.spec import dtype_name

OUTPUT_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BYTES = (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn)


def gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, alpha: Tensor | None = None, *, kind: str,
         dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None, c: Tensor | None = None,
         out: Tensor | None = None, configuration: Configuration | None = None) -> Tensor:
    """``D = alpha · A · Bᵀ (+ bias) (+ C)`` on the current stream, accumulated in fp32.

    Waits for nothing and allocates only through PyTorch, so that CUDA graphs can capture it once its kernel is built.
    A product over no terms, K = 0, is zero; then and where D is empty no kernel runs.

    Args:
        a: ``[M, K/2]`` uint8 with two E2M1 codes a byte, or for ``mxf8`` ``[M, K]`` float8_e4m3fn or uint8; rows are
            contiguous, any multiple of 16 bytes apart. b: the same, ``[N, …]``.
        a_scales, b_scales: one byte a block, in the layout of ``quartet.kernels.reference.swizzle_scales``: contiguous,
            ``swizzled_size(M, K/block)`` and ``swizzled_size(N, K/block)`` of them; E8M0, or E4M3 for ``nvf4``.
        alpha: fp32 scalar on the device; None is 1.
        kind: ``mxf4``, ``nvf4`` or ``mxf8``. dtype: of D, C and the bias: bfloat16, float16 or float32.
        bias: ``[N]``. c: ``[M, N]``, rows contiguous.
        out: where to write D, ``[M, N]``; may be ``c`` itself. By default a new tensor.
        configuration: instead of the one that :func:`~quartet.kernels.cutlass.selection.select` picks; its dtype, bias
            and C have to be those of this call.
    Raises:
        ValueError: operands that do not fit together, or that no kernel takes; the message names the sizes.
        BuildError: the kernel cannot be built. KernelError: CUTLASS or CUDA refuse.
    """
    m, n, k = _extents(a, b, kind)
    if dtype not in OUTPUT_OF:
        raise ValueError(f"output dtype {dtype_name(dtype)} is not possible; use bfloat16, float16 or float32")
    for name, x in (("c", c), ("out", out)):
        if x is not None:
            _check_matrix(name, x, m, n, dtype, a.device)
    if bias is not None:
        _check_vector("bias", bias, n, (dtype,), a.device)
    if 0 in (m, n, k):
        return _without_product(torch.empty(m, n, dtype=dtype, device=a.device) if out is None else out, bias, c)
    reason = supports(kind, m, n, k, OUTPUT_OF[dtype])
    if reason is not None:
        raise ConfigurationError(reason)
    _check_vector("a_scales", a_scales, swizzled_size(m, k // BLOCK[kind]), _BYTES, a.device)
    _check_vector("b_scales", b_scales, swizzled_size(n, k // BLOCK[kind]), _BYTES, a.device)
    if alpha is not None:
        _check_vector("alpha", alpha, 1, (torch.float32,), a.device)
    arch, multiprocessors = _device(a.device)
    if configuration is None:
        product = Product(arch, kind, OUTPUT_OF[dtype], bias is not None, c is not None, m, n, k)
        configuration = select(product, a.device, multiprocessors)
    else:
        _check_configuration(configuration, arch, kind, dtype, bias is not None, c is not None)
    d = torch.empty(m, n, dtype=dtype, device=a.device) if out is None else out
    per_byte = 8 // ELEMENT_BITS[kind]
    problem = Problem(
        a=a.data_ptr(), a_scales=a_scales.data_ptr(), b=b.data_ptr(), b_scales=b_scales.data_ptr(), d=d.data_ptr(),
        c=None if c is None else c.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        alpha=None if alpha is None else alpha.data_ptr(), lda=_leading(a) * per_byte, ldb=_leading(b) * per_byte,
        ldc=n if c is None else _leading(c), ldd=_leading(d), m=m, n=n, k=k, device=a.device.index or 0,
        multiprocessors=multiprocessors)
    with torch.cuda.device(a.device):
        library, size = _prepared(configuration, m, n, k, problem.device, multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device=a.device) if size else None
        library.run(problem, None if workspace is None else workspace.data_ptr(),
                    torch.cuda.current_stream(a.device).cuda_stream)
    return d


def product_of(a: Tensor, b: Tensor, kind: str, dtype: torch.dtype, bias: bool = False, c: bool = False) -> Product:
    """What :func:`gemm` would compute of these operands, on their device; errors as there."""
    return Product(_device(a.device)[0], kind, OUTPUT_OF[dtype], bias, c, *_extents(a, b, kind))


def _without_product(d: Tensor, bias: Tensor | None, c: Tensor | None) -> Tensor:
    """``D = 0 (+ bias) (+ C)``."""
    if c is None:
        d.zero_()
    elif c is not d:
        d.copy_(c)
    return d if bias is None else d.add_(bias)


@lru_cache(maxsize=4096)
def _prepared(configuration: Configuration, m: int, n: int, k: int, device: int, multiprocessors: int,
              ) -> tuple[Library, int]:
    """The opened kernel and the bytes of its workspace for a shape on a GPU."""
    library, problem = load(configuration), Problem.contiguous(m, n, k)
    problem.device, problem.multiprocessors = device, multiprocessors
    library.check(library.can_implement(problem), problem)
    return library, library.workspace_size(problem)


@cache
def _device(device: torch.device) -> tuple[str, int]:
    """Architecture and multiprocessors of a GPU."""
    if device.type != "cuda":
        raise ValueError(f"CUTLASS kernels run on a GPU, not on {device}; move the operands with .cuda()")
    capability = torch.cuda.get_device_capability(device)
    arch = arch_of(capability)
    if arch is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in ARCH_OF_CAPABILITY)
        raise ValueError(f"{device} has compute capability {capability[0]}.{capability[1]}; block-scaled tensor cores "
                         f"have {known}")
    return arch, torch.cuda.get_device_properties(device).multi_processor_count


def _extents(a: Tensor, b: Tensor, kind: str) -> tuple[int, int, int]:
    if kind not in ELEMENT_BITS:
        raise ValueError(f"kind {kind!r} does not exist; possible: {', '.join(ELEMENT_BITS)}")
    legal = (torch.uint8, torch.float8_e4m3fn) if kind == "mxf8" else (torch.uint8,)
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or x.dtype not in legal or (x.stride(-1) != 1 and x.numel()):
            raise ValueError(f"{name} has to be a 2-D {' or '.join(map(dtype_name, legal))} tensor for {kind}, its "
                             f"rows contiguous, not {dtype_name(x.dtype)} {list(x.shape)} with strides {x.stride()}; "
                             "call .contiguous()")
    if a.shape[1] != b.shape[1] or a.device != b.device:
        raise ValueError(f"a {list(a.shape)} on {a.device} and b {list(b.shape)} on {b.device} do not fit: their rows "
                         "have to be equally long and on one device")
    return a.shape[0], b.shape[0], a.shape[1] * 8 // ELEMENT_BITS[kind]


def _leading(x: Tensor) -> int:
    """Elements from one row to the next; PyTorch gives a single row any stride."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _check_vector(name: str, x: Tensor, size: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if x.numel() != size or x.dtype not in dtypes or x.device != device or not x.is_contiguous():
        raise ValueError(f"{name} has to be {size} contiguous {' or '.join(map(dtype_name, dtypes))} on {device}, not "
                         f"{x.numel()} {dtype_name(x.dtype)} on {x.device}"
                         f"{'' if x.is_contiguous() else ', not contiguous'}")


def _check_matrix(name: str, x: Tensor, m: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != (m, n) or x.dtype != dtype or x.device != device or (x.stride(1) != 1 and x.numel()):
        raise ValueError(f"{name} has to be [{m}, {n}] {dtype_name(dtype)} on {device} with contiguous rows, not "
                         f"{list(x.shape)} {dtype_name(x.dtype)} on {x.device} with strides {x.stride()}")


def _check_configuration(c: Configuration, arch: str, kind: str, dtype: torch.dtype, bias: bool, source: bool) -> None:
    wanted = {"arch": arch, "kind": kind, "output": OUTPUT_OF[dtype], "bias": bias, "accumulate": source}
    wrong = [f"{name} {getattr(c, name)!r}, not {value!r}" for name, value in wanted.items()
             if getattr(c, name) != value]
    if wrong:
        raise ConfigurationError(f"configuration {c.name} does not fit the call: it has {'; '.join(wrong)}")
