"""Products of NVFP4, MXFP8, FP8 in blocks and INT8 on a GPU, alone and in a step, against the reference on that GPU."""

from __future__ import annotations

import pytest
import torch

from quartet.backend import compile_graph
from quartet.cli.selftest import run as selftest
from quartet.kernels import reference
from quartet.lowering import registry
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.targets.blackwell import block_scaled_ops
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.devices import Target

pytestmark = pytest.mark.gpu
SIZES = ((256, 512, 1024), (300, 130, 640), (7, 48, 96))  # tokens, in, out
TENSOR_CORES = ("cutlass", "scaled-mm", "cublaslt", "int-mm")


@pytest.mark.parametrize("product", selftest.PRODUCTS, ids=lambda product: product.name)
def test_product(product, device):
    kernel = next(k for k in registry.KERNELS if k.name == product.kernel)
    for spec in (product.a, product.b):
        reason = kernel.supports(Target.of(device), torch.bfloat16, spec, product.rotation)
        if reason is not None:
            pytest.skip(reason)
    for m, n, k in (*selftest.SHAPES, (33, 16, 64)):
        right, worst = selftest._product(device, m, n, k, product)
        assert right, f"{m}×{n}×{k}: {worst}"


def step(policy, disabled, module, x, gradient):
    """Output and gradients through Inductor, and the kernel of each role."""
    options = Options.parse(None, {"policy": policy, "disable_kernels": list(disabled)}, passes=pipeline.OPTIONAL,
                            kernels=registry.NAMES)
    records: list[MatmulRecord] = []
    compiled = torch.compile(module, backend=lambda gm, inputs: compile_graph(gm, inputs, options,
                                                                              collect=records.extend), dynamic=False)
    x = x.detach().requires_grad_()
    torch.manual_seed(0)
    out = compiled(x)
    grads = torch.autograd.grad(out, [x, module.weight], gradient)
    torch._dynamo.reset()
    return [out.detach(), *grads], {r.role: r.kernel for r in records}


@pytest.mark.parametrize("policy", ["nvfp4", "quartet2", "mxfp8", "fp8-block", "fp8-delayed", "int8-all", "bitnet"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step(policy, sizes, device):
    tokens, k, n = sizes
    torch.manual_seed(1)
    module = torch.nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    x, gradient = (torch.randn(tokens, size, device=device, dtype=torch.bfloat16) for size in (k, n))
    got, kernels = step(policy, (), module, x, gradient)
    if not set(kernels.values()) & set(TENSOR_CORES):
        pytest.skip(f"this GPU multiplies no format of {policy}: {kernels}")
    wanted, plain = step(policy, TENSOR_CORES, module, x, gradient)
    assert not set(plain.values()) & set(TENSOR_CORES)
    for a, b in zip(got, wanted, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_swizzle(dtype, tile, device):
    from quartet.lowering.targets import inductor

    if dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    inductor.register()
    scales = torch.rand(130, 6, device=device).mul(400).to(dtype)
    compiled = torch.compile(lambda s: block_scaled_ops.SWIZZLE(s, tile) + 0)
    wanted = reference.swizzle_scales(scales.view(torch.uint8).repeat_interleave(tile, 0))
    assert torch.equal(compiled(scales), wanted)
