"""A recipe of one's own, and a policy that uses it, printed, explained, trained with, written to TOML and read back.

    python examples/custom_policy.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import quartet
from quartet import Gemm, Operand, Policy, QuantSpec, Recipe

# MXFP4 without a rotation: absmax scales that never clip forward, nearest rounding backward.
FORWARD = Operand(QuantSpec(element="e2m1", block=32, rule="ceil"))
GRADIENT = Operand(QuantSpec(element="e2m1", block=32, rule="headroom", rounding="nearest"))
SAVED = Operand(QuantSpec(element="e2m1", block=32, rule="headroom", rounding="nearest"), source="saved")

plain_mxfp4 = quartet.register(Recipe(
    name="plain-mxfp4",
    summary="MXFP4, absmax, no rotation, nearest everywhere",
    fprop=Gemm(FORWARD, FORWARD),
    dgrad=Gemm(GRADIENT, SAVED),
    wgrad=Gemm(GRADIENT, SAVED),
))


class Mlp(torch.nn.Module):
    """``[tokens, 64] → [tokens, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(64, 256)
        self.down_proj = torch.nn.Linear(256, 64)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down_proj(torch.nn.functional.gelu(self.up_proj(x))))


def make_policy() -> Policy:
    """The recipe everywhere; the head in high precision; wide weight gradients by the built-in recipe."""
    policy = Policy("plain-mxfp4").on("head", None)
    return policy.on("linear", "quartet", role="wgrad", shape="k >= 256 and n % 32 == 0")


def main(steps: int = 5) -> list[float]:
    """Run the example on random data; returns the losses."""
    policy = make_policy()
    print(policy)
    path = Path(tempfile.mkdtemp()) / "policy.toml"
    path.write_text(policy.to_toml(), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    assert Policy.from_toml(path) == policy

    torch.manual_seed(0)
    model, x, target = Mlp(), torch.randn(128, 64), torch.randint(10, (128,))
    compiled = torch.compile(model, backend="quartet", options={"policy": policy})
    print(quartet.explain(compiled, x))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(compiled(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("loss", *(f"{value:.3f}" for value in losses))
    return losses


if __name__ == "__main__":
    main()
