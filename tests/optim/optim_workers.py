"""What one of several gloo processes does; the tests look at what the ranks return."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from quartet import optim

WIDTH = 256
CASES = {
    "pair": lambda p: optim.AdamW(p, 1e-2, generator=generator()),
    "current": lambda p: optim.AdamW(p, 1e-2, state_format="e4m3/tensor current", generator=generator()),
    "blocks": lambda p: optim.AdamW(p, 1e-2, state_format="e4m3/256", generator=generator()),
    "coat": lambda p: optim.AdamW(p, 1e-2, state_format="coat", generator=generator()),
    "rounded": lambda p: optim.AdamW(p, 1e-2, state_format="dynamic", stochastic_rounding=True, generator=generator()),
    "master": lambda p: optim.AdamW(p, 1e-2, master="fp16", generator=generator()),
    "lion": lambda p: optim.Lion(p, 1e-3, generator=generator()),
}


def generator():
    return torch.Generator().manual_seed(5)


def model(case):
    """Rows that two ranks share unevenly, and a bias that stays in fp32."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(WIDTH, 47), nn.GELU(), nn.Linear(47, WIDTH), nn.Linear(WIDTH, 51, bias=False))
    return net.bfloat16() if case in ("rounded", "master") else net


def gradients(net, step):
    """The same gradients for whole parameters and for their shards."""
    for i, p in enumerate(net.parameters()):
        full = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype) * 1e-2
        if isinstance(p, DTensor):
            rows = -(-p.shape[0] // 2)
            part = full[rows * dist.get_rank():rows * (dist.get_rank() + 1)].contiguous()
            p.grad = DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                        stride=p.stride())
        else:
            p.grad = full


def train(net, optimizer, steps):
    for step in steps:
        gradients(net, step)
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in net.parameters()]


def save(rank, folder):
    """Two ranks train three steps, save, and go on for two; what the weights were then."""
    found = {}
    for case, make in CASES.items():
        net = fully_shard(model(case))
        optimizer = make(net.parameters())
        train(net, optimizer, range(3))
        weights, states = get_state_dict(net, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{case}")
        found[case] = {"then": [p.detach() for p in train(net, optimizer, range(3, 5))],
                       "sharded": [isinstance(v, DTensor) for v in optimizer.state[next(net.parameters())].values()]}
    return found


def load(rank, folder, place=lambda net: net):
    """Load each checkpoint into a new optimizer and go on: on one rank, nothing sharded, unless ``place`` says else."""
    found = {}
    for case, make in CASES.items():
        net = place(model(case))
        optimizer = make(net.parameters())
        weights, states = get_state_dict(net, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{case}")
        set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=states)
        found[case] = [p.detach() for p in train(net, optimizer, range(3, 5))]
    return found


def load_sharded(rank, folder):
    """Two ranks again."""
    return load(rank, folder, fully_shard)
