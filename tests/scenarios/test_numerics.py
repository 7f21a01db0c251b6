"""The compiled graph computes what the reference computes, and its gradient is unbiased."""

import pytest
import torch
from harness import compile_eager, loss_of, step
from models import MLP, data
from torch import nn
from torch.nn import functional as F

from quartet import Gemm, Operand, Policy, QuantSpec, Recipe
from quartet.kernels.reference.hadamard import FLAT_SIGNS, hadamard
from quartet.kernels.reference.products.linear import FORWARD, QuartetLinear, linear_forward
from quartet.kernels.reference.quantize import dequantize
from quartet.recipes import recipes


class ExactBackward(torch.autograd.Function):
    """The quantised forward with its own gradient in high precision: what the stochastic backward estimates."""

    @staticmethod
    def forward(ctx, x, w):
        y, xq, wq = linear_forward(x, w)
        ctx.save_for_backward(*xq[:2], *wq[:2])
        ctx.width = x.shape[1]
        return y

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        x, w = dequantize(*saved[:2], FORWARD), dequantize(*saved[2:], FORWARD)

        def unrotate(g):
            return hadamard(g, 32, torch.tensor(FLAT_SIGNS), inverse=True)[:, : ctx.width]

        return unrotate(grad @ w), unrotate(grad.t() @ x)


def drawn_seed(value):
    torch.manual_seed(value)
    return torch.randint(0, 2**62, [1])


@pytest.mark.parametrize("kernels", [(), ("cpp",)])
@pytest.mark.parametrize(("rows", "width", "out"), [(64, 64, 32), (33, 80, 50)])
@pytest.mark.parametrize("recipe", ["quartet", "quartet-paper"])
def test_compiled_linear_is_the_reference_bit_for_bit(recipe, rows, width, out, kernels):
    layer, (x,) = nn.Linear(width, out), data(rows, width, grad=True)()
    compiled, _ = compile_eager(lambda x: layer(x), recipe, disable_kernels=kernels)
    torch.manual_seed(11)
    y = compiled(x)
    grad = torch.randn(rows, out, generator=torch.Generator().manual_seed(2))
    gx, gw = torch.autograd.grad(y, (x, layer.weight), grad)
    xr, wr = x.detach().requires_grad_(), layer.weight.detach().requires_grad_()
    paper = (recipes()[recipe].fprop.a.spec, 32, None) if recipe == "quartet-paper" else ()
    expected = QuartetLinear.apply(xr, wr, drawn_seed(11), 0, *paper)
    assert torch.equal(y, expected + layer.bias)
    expected.backward(grad)
    assert torch.equal(gx, xr.grad) and torch.equal(gw, wr.grad)


def test_a_gradient_that_comes_back_from_a_rotated_basis_is_quantised_as_it_is():
    """What dgrad of the second layer turns back is E of the first, which another recipe does not rotate."""
    operand = Operand(QuantSpec.parse("e2m1/32 e8m0 even nearest"))
    plain = Recipe("unrotated", fprop=Gemm(operand, operand), dgrad=Gemm(operand, operand))
    policy = Policy("quartet").on("0", plain).on("1", "quartet")
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 128, bias=False))
    (x,) = data(64, 64, grad=True)()
    gradients = []
    for kernels in ((), ("cpp",)):
        torch._dynamo.reset()
        compiled, backend = compile_eager(model, policy, disable_kernels=kernels)
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(compiled(x).square().sum(), x)[0])
        assert ("cpp" in {r.kernel for r in backend.records}) != bool(kernels)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


def test_mean_of_stochastic_gradients_approaches_the_exact_one():
    model, (x,) = MLP(), data(32, 64, grad=True)()
    hidden = F.gelu(ExactBackward.apply(x, model.up.weight) + model.up.bias)
    loss_of(ExactBackward.apply(hidden, model.down.weight)).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()} | {"input0": x.grad.clone()}

    compiled, backend = compile_eager(model)
    total = {name: torch.zeros_like(g) for name, g in exact.items()}
    errors = {name: {} for name in exact}
    for k in range(1, 257):
        for name, grad in step(compiled, model, (x,), seed=k)[1].items():
            total[name] += grad
            if k in (16, 64, 256):
                errors[name][k] = float((total[name] / k - exact[name]).norm() / exact[name].norm())
    assert len(backend.records) == 6 and all(record.lowered for record in backend.records)
    for name, by_k in errors.items():
        assert by_k[256] < 0.06, (name, by_k)
        assert 1.5 < by_k[16] / by_k[64] < 2.7 and 1.5 < by_k[64] / by_k[256] < 2.7, (name, by_k)
