"""The ops of weights and outliers inside Inductor, and a training step of their recipes by real generated code."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import quartet
from quartet.backend import compile_graph
from quartet.lowering.ir.ops import outliers as outlier_ops
from quartet.lowering.ir.ops import weights as weight_ops
from quartet.options import Options
from quartet.runtime.capture import Capture

pytestmark = pytest.mark.usefixtures("inductor")
ROW, BLOCK = "e2m1/row fp32 amax nearest", "e2m1/32 e8m0 ceil nearest"


def test_movement_is_a_call():
    torch.manual_seed(0)
    x = torch.randn(40, 70) * torch.exp2(torch.randint(-20, 20, (40, 1)).float())
    x[0], x[1, 3], x[2, :8] = 0, float("nan"), torch.tensor([0.25, -0.75, 1.25, 2.5, -5.0, 6.0, 7.0, -0.0])
    ref = x * (1 + 0.3 * torch.randn(40, 70))
    got, code = run_and_get_code(torch.compile(lambda x, ref: weight_ops.TOWARD(x, ref, BLOCK)), x, ref)
    want = weight_ops.TOWARD(x, ref, BLOCK)
    assert torch.equal(got.isnan(), want.isnan()) and want[1, :32].isnan().all()
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert any("quartet.toward" in text for text in code)


@pytest.mark.parametrize("spec", [ROW, BLOCK])
def test_slope_is_the_reference_but_for_the_power(spec):
    torch.manual_seed(0)
    gw, w = torch.randn(40, 37), torch.randn(40, 37)
    w[0] = 0
    got, code = run_and_get_code(torch.compile(lambda g, w: g * weight_ops.DGE(w, spec)), gw, w)
    torch.testing.assert_close(got, gw * weight_ops.DGE(w, spec), rtol=1e-5, atol=1e-6)
    assert not any("quartet.dge" in text for text in code)


def test_outliers_are_calls():
    def product(x, w):
        clipped, *rest = outlier_ops.SPLIT_OUTLIERS(x + 1, 0.99)
        return clipped * 2, outlier_ops.SPARSE_MM(*rest, w, 64, False)

    torch.manual_seed(0)
    x, w = torch.randn(100, 64), torch.randn(64, 16)
    got, _ = run_and_get_code(torch.compile(product, dynamic=True), x, w)
    for a, b in zip(got, product(x, w), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recipe", ["fp4-dge", "tetrajet-ema"])
def test_three_steps_of_training(recipe):
    """What Inductor makes of them against the same graphs run eagerly."""
    def run(backend):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(32, 16)
        compiled = torch.compile(model, **backend)
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(40, 32, requires_grad=True)
            loss = compiled(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        state = quartet.state_dict(model).get("averages", {})
        return losses, [x.grad, *(p.grad for p in model.parameters())], [entry["average"] for entry in state.values()]

    # Rounded to nearest in backward, so that both draw nothing and a bit of difference in an operand stays one.
    base = quartet.recipes()[recipe]
    if recipe == "tetrajet-ema":
        spec = quartet.QuantSpec.parse(BLOCK)
        backward = quartet.Gemm(quartet.Operand(spec), quartet.Operand(spec, "saved"))
        base = replace(base, name="ema", dgrad=backward, wgrad=backward, average=0.5)
    policy = quartet.Policy(base)
    eager = run({"backend": lambda gm, x: compile_graph(gm, x, Options(policy=policy), Capture())})
    real = run({"backend": "quartet", "options": {"policy": policy}})
    assert real[0] == pytest.approx(eager[0], rel=1e-3)
    for a, b in zip(real[1], eager[1], strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
    assert len(real[2]) == (1 if recipe == "tetrajet-ema" else 0)
    for a, b in zip(real[2], eager[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
