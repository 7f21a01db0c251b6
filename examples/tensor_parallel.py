"""A Llama whose layers are divided among processes by PyTorch's tensor parallelism.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    python examples/tensor_parallel.py                                # one process, the same program

Every process holds some heads and some features of each layer and sees all tokens. What all of them hold, such as the
norms, has to stay equal: they draw the same random bits because the mesh of the sharded weights says who they are.
Tensor parallelism on plain tensors names the group itself: ``quartet.compile(model, policy, same_bits=group)``.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from corpus import read_corpus
from descent import learning_rate
from llama import PRESETS, Llama
from ranks import process_group, say
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import quartet


def build(size: str, length: int, device: torch.device) -> Llama:
    """The model with the layers of its blocks divided among all processes."""
    torch.manual_seed(0)
    model = Llama(PRESETS[size], length).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    if PRESETS[size].heads % mesh.size():
        raise SystemExit(f"{PRESETS[size].heads} heads do not divide among {mesh.size()} processes")
    for block in model.blocks:
        into, out = ColwiseParallel(), RowwiseParallel()
        parallelize_module(block, mesh, {
            "attention.q_proj": into, "attention.k_proj": into, "attention.v_proj": into, "attention.o_proj": out,
            "ffn.gate_proj": into, "ffn.up_proj": into, "ffn.down_proj": out})
        block.attention.heads //= mesh.size()
    return model


def drift(model: Llama) -> float:
    """The largest difference of any replicated parameter to that of the first process."""
    largest = 0.0
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            first = parameter.detach().clone()
            dist.broadcast(first, 0)
            largest = max(largest, (parameter.detach() - first).abs().max().item())
    return largest


def main() -> list[float]:
    """Train; returns the losses in nats a byte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--policy", default="quartet", help="a recipe or a .toml file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()
    with process_group() as device:
        model = build(arguments.size, arguments.seq, device)
        optimizer = torch.optim.AdamW(model.parameters(), arguments.lr, foreach=False)
        for block in model.blocks:
            quartet.compile(block, arguments.policy)
        corpus, losses = read_corpus(), []
        for step in range(arguments.steps):
            tokens, targets = corpus.batch("train", 0, step, arguments.batch, arguments.seq)
            loss = model(tokens.to(device), targets.to(device))
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % 10 == 0 or step == arguments.steps - 1:
                say(f"step {step:4d}  loss {losses[-1]:.3f}")
        say(f"replicated parameters differ by at most {drift(model)}")
        assert drift(model) == 0.0
    return losses


if __name__ == "__main__":
    main()
