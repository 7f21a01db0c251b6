"""Products on a GPU of as many rows as the data decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quartet  # noqa: F401

pytestmark = pytest.mark.gpu


class Selected(nn.Module):
    """A layer over the tokens that the data picks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16, device="cuda")
        self.second = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.second(y[torch.nonzero(x[:, 0] > 0).squeeze(1)]).float().square().mean()


def gradient(module: nn.Module, run: nn.Module, x: Tensor) -> Tensor:
    module.zero_grad()
    run(x).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()]).float()


@pytest.mark.parametrize("policy", ["fp8", "fp8-rowwise", "quartet", "mxfp8"])
def test_rows_that_only_the_data_decides_are_trained_with(policy):
    torch.manual_seed(0)
    model = Selected()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, backend="quartet", fullgraph=True, options={"policy": policy})
        for tokens in (512, 512, 300):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            exact, ours = gradient(model, model, x), gradient(model, compiled, x)
            assert torch.nn.functional.cosine_similarity(exact, ours, dim=0) > (0.85 if policy == "quartet" else 0.99)
            assert 0 < (ours - exact).norm() / exact.norm() < 0.6
