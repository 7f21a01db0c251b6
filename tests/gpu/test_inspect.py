"""The inspector on a GPU: the reference's statistics, nobody waits for the device, the numbers of training stay."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

import quartet
from quartet.inspect import Inspector, NotFinite
from quartet.kernels.reference import statistics
from quartet.kernels.spec import QuantSpec
from quartet.recipes import recipes

pytestmark = pytest.mark.gpu
GEMMS = [gemm for recipe in recipes().values() for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad) if gemm]
SPECS = sorted({str(operand.spec) for gemm in GEMMS for operand in (gemm.a, gemm.b) if operand.spec is not None})


class Gated(nn.Module):
    def __init__(self, width=256, hidden=512):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("spec", SPECS)
def test_statistics_are_those_of_a_cpu(spec):
    torch.manual_seed(0)
    x = torch.randn(96, 200) * torch.exp2(torch.randint(-6, 6, (96, 1)).float())
    here = statistics.operand_statistics(x, QuantSpec.parse(spec), torch.tensor([7]), 5)
    there = statistics.operand_statistics(x.cuda(), QuantSpec.parse(spec), torch.tensor([7], device="cuda"), 5)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-7, equal_nan=True)


def steps(model, count=4, **options):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="quartet", options={"policy": quartet.Policy("quartet"), **options})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for number in range(count):
        torch.manual_seed(number)
        x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
        loss = compiled(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_is_what_it_is_without():
    torch.manual_seed(0)
    model = Gated().to("cuda", torch.bfloat16)
    twin, inspector = copy.deepcopy(model), Inspector(2, ["mxfp8", "fp8"])
    assert torch.equal(steps(model), steps(twin, inspect=inspector, check="finite"))
    found = inspector.statistics()
    assert found.steps == (0, 2) and "up dgrad" in found.what_if()
    assert all(r.values["cosine"] > 0.9 for r in found.where(kind="product"))
    assert all(0 < r.values["error"] < 0.1 for r in found.where(kind="operand"))


def test_nobody_waits_for_the_device():
    torch.manual_seed(0)
    model, inspector = Gated().to("cuda", torch.bfloat16), Inspector(1, ["mxfp8", "quartet", "nvfp4"])
    compiled = torch.compile(model, backend="quartet", options={"policy": quartet.Policy("quartet"),
                                                                "inspect": inspector})
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(6):
        torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
        try:
            compiled(x).float().square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert inspector.statistics().steps == tuple(range(6))


class Mixture(nn.Module):
    """Experts, between whose products tokens stay padded, and a product of two activations."""

    def __init__(self, experts=12, width=256, hidden=512):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(experts, *shape) / 16) for shape in ((width, hidden),
                                                                                            (hidden, width)))

    def forward(self, x, offs):
        y = nn.functional.grouped_mm(silu(nn.functional.grouped_mm(x, self.up, offs=offs)), self.down, offs=offs)
        heads = y.view(32, -1, 64)
        return heads @ heads.mT @ heads


@pytest.mark.parametrize("recipe", ["quartet", "fp8-rowwise", "mxfp8"])
def test_products_of_batches_and_of_groups_without_waiting(recipe):
    torch.manual_seed(0)
    model, inspector = Mixture().to("cuda", torch.bfloat16), Inspector(1, ["mxfp8", "fp8-rowwise"])
    policy = quartet.Policy(None).on("grouped", recipe).on("bmm", recipe)
    compiled = torch.compile(model, backend="quartet", options={"policy": policy, "inspect": inspector})
    x = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16)
    offs = (torch.arange(1, 13, device="cuda") * 80).to(torch.int32)  # 64 tokens belong to no group
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for number in range(5):
        torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
        try:
            compiled(x, offs).float().square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = inspector.statistics().where(step=4)
    cosines = {r.name: r.values["cosine"] for r in found.where(kind="product")}
    assert {"up wgrad", "down dgrad", "down wgrad"} <= cosines.keys() and any("bmm" in name for name in cosines)
    assert all(cosine > 0.9 for cosine in cosines.values()), cosines
    assert "down wgrad" in found.what_if()


def test_the_first_value_that_is_not_finite():
    model = Gated().to("cuda", torch.bfloat16)
    with torch.no_grad():
        model.up.weight[3, 4] = float("nan")
    with pytest.raises(NotFinite, match="step 0: fprop of up .*: W"):
        steps(model, 1, check="finite")
