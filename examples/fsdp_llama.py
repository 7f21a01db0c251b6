"""A Llama whose parameters, gradients and optimizer states are divided among processes by FSDP2.

    python examples/fsdp_llama.py
    torchrun --nproc-per-node 2 examples/fsdp_llama.py
    torchrun --nproc-per-node 8 examples/fsdp_llama.py --size demo --policy fp8 --steps 500

On GPUs where there are enough of them, else on the CPU. Blocks are sharded, then compiled: one graph serves all of them
between the gathers of weights. The checkpoint is one that any number of processes goes on from (``--resume``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from corpus import read_corpus
from descent import adamw, descend, learning_rate
from llama import PRESETS, Llama
from output import as_path
from ranks import process_group, say
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import quartet


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="tiny")
    parser.add_argument("--policy", default="quartet", help="a recipe or a .toml file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step on each process")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=as_path, default=Path("fsdp-out"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()


def build(arguments: argparse.Namespace, device: torch.device) -> Llama:
    """The model, sharded and with its blocks compiled."""
    torch.manual_seed(0)
    model = Llama(PRESETS[arguments.size], arguments.seq).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    numbers = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=numbers)
    fully_shard(model, mesh=mesh, mp_policy=numbers)
    for block in model.blocks:
        quartet.compile(block, arguments.policy)
    return model


def state(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "quartet": quartet.State(model)}


def main() -> list[float]:
    """Train and save; returns the losses, a mean over the processes, in nats a byte."""
    arguments = parse_arguments()
    with process_group() as device:
        model = build(arguments, device)
        optimizer = adamw(model, arguments.lr)
        if arguments.resume:
            kept = state(model, optimizer)
            dcp.load(kept, checkpoint_id=arguments.out / "checkpoint")
            set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
        corpus, losses = read_corpus(), []
        for step in range(arguments.steps):
            tokens, targets = corpus.batch("train", dist.get_rank(), step, arguments.batch, arguments.seq)
            loss = model(tokens.to(device), targets.to(device))
            descend(model, optimizer, loss, learning_rate(step, arguments.steps, arguments.lr))
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / dist.get_world_size())
            if step % 10 == 0 or step == arguments.steps - 1:
                say(f"step {step:4d}  loss {losses[-1]:.3f}")
        dcp.save(state(model, optimizer), checkpoint_id=arguments.out / "checkpoint")
        say(f"the checkpoint is in {arguments.out / 'checkpoint'}")
    return losses


if __name__ == "__main__":
    main()
