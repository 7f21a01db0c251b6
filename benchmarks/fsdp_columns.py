"""What ``bench_fsdp.py`` trains: a Llama under FSDP2 per block, each column in its own low precision."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.distributed as dist
from llama import Llama, LlamaConfig
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

PACKED = "+packed"
COLUMNS = ("bf16", "torchao", "fp8", "fp8" + PACKED, "quartet", "quartet" + PACKED)
PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """A model, and what of it is trained on: ``batch`` sequences of ``length`` tokens on each rank.

    ``layers`` of ``whole`` are there.
    """

    config: LlamaConfig
    batch: int
    length: int
    whole: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def label(self) -> str:
        c = self.config
        part = "" if c.layers == self.whole else f" of {self.whole}"
        return (f"{c.layers}{part} layers of {c.dim} × {c.ffn}, {c.heads} heads, vocabulary {c.vocabulary}, "
                f"{self.batch} × {self.length} tokens a rank")


def shape(name: str, layers: int | None) -> Shape:
    """``1b`` and ``8b`` have the widths of Llama 3.2 1B and 3 8B with as many key heads as query heads."""
    dim, depth, heads, ffn, vocabulary, batch, length, shown = {
        "1b": (2048, 16, 32, 8192, 32000, 4, 2048, 16), "8b": (4096, 32, 32, 14336, 32000, 2, 4096, 6),
        "tiny": (128, 2, 2, 256, 256, 2, 64, 2)}[name]
    config = LlamaConfig(dim, layers or shown, heads, ffn, vocabulary=vocabulary)
    return Shape(config, batch, length, depth)


@dataclass
class Run:
    """A column in training.

    Attributes:
        model: under FSDP2. losses: of every step so far, of this rank's batch.
        gathered: how the weights travel, as a sentence.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shape: Shape
    device: torch.device
    after_step: Callable[[], None] = lambda: None
    gathered: str = ""
    losses: list[Tensor] = field(default_factory=list)

    def step(self) -> None:
        i = len(self.losses)
        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + i % 4)
        size = self.shape.batch, self.shape.length + 1
        tokens = torch.randint(self.shape.config.vocabulary, size, generator=generator).to(self.device)
        loss = self.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()
        self.losses.append(loss.detach())

    def reshard(self, after_forward: bool) -> None:
        """Whether the blocks free their weights after forward, and gather them again for backward."""
        for block in self.model.blocks:
            block.set_reshard_after_forward(after_forward)


def backend(policy: str | None, eager: bool) -> dict[str, Any]:
    """How a module of a column is compiled; ``eager``: without code generation, for dry runs."""
    if policy is None:
        return {"backend": "aot_eager" if eager else "inductor", "dynamic": False}
    if eager:
        from quartet.backend import compile_graph
        from quartet.options import Options
        from quartet.policy import Policy
        from quartet.runtime.capture import Capture

        options = Options(policy=Policy.coerce(policy))
        return {"backend": lambda gm, inputs: compile_graph(gm, inputs, options, Capture()), "dynamic": False}
    from gpu_common import our_backend

    return {"backend": our_backend(), "options": {"policy": policy}, "dynamic": False}


def prepared(column: str, shape: Shape, device: torch.device, eager: bool, seed: int = 0) -> Run:
    """A column before its first step. Raises ImportError where torchao is not there."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Llama(shape.config, shape.length)
    policy = None if column in ("bf16", "torchao") else column.removesuffix(PACKED)
    after_step: Callable[[], None] = lambda: None  # noqa: E731
    if column == "torchao":
        from torchao.float8 import (
            Float8LinearConfig,
            convert_to_float8_training,
            precompute_float8_dynamic_scale_for_fsdp,
        )

        convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True),
                                   module_filter_fn=lambda module, name: name.startswith("blocks."))
        after_step = lambda: precompute_float8_dynamic_scale_for_fsdp(model)  # noqa: E731
    for block in model.blocks:
        block.compile(**backend(policy, eager))
        fully_shard(block, mp_policy=PRECISION)
    fully_shard(model, mp_policy=PRECISION)
    gathered = ""
    if column.endswith(PACKED):
        from quartet.distributed import pack_all_gather

        gathered = str(pack_all_gather(model, policy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    return Run(model, optimizer, shape, device, after_step, gathered)
