"""What one of several gloo processes does; the tests look at what the ranks return."""

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

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


SUITE = {"dynamic": "dynamic", "e4m3/256": "e4m3/256", "pair": ("e4m3", "e5m2")}


def suite(rank, folder):
    """What torchao's FSDP2 test does: real backwards beside a whole model, then the optimizer alone through a file."""
    found = {}
    for case, form in SUITE.items():
        torch.manual_seed(42)
        whole = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)))
        sharded = copy.deepcopy(whole)
        for block in sharded:
            fully_shard(block)
        fully_shard(sharded)
        optimizers = [optim.AdamW(net.parameters(), lr=1e-2, state_format=form) for net in (whole, sharded)]
        torch.manual_seed(43 + rank)
        losses = []
        for step in range(5):
            x = torch.randn(3, WIDTH)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            pair = [net(x).square().mean() for net in (whole, sharded)]
            for loss in pair:
                loss.backward()
            for p in whole.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            for optimizer in optimizers:
                optimizer.step()
            losses.append([loss.item() for loss in pair])
        moments = [optimizers[0].decoded(next(whole.parameters()), "exp_avg"),
                   optimizers[1].decoded(next(sharded.parameters()), "exp_avg").full_tensor()]
        dcp.save(optimizers[1].state_dict(), checkpoint_id=f"{folder}/suite-{case.replace('/', '-')}")
        resumed = optim.AdamW(sharded.parameters(), lr=1e-2, state_format=form)
        for p in sharded.parameters():
            p.grad = torch.zeros_like(p)
        resumed.step()
        dcp.load(resumed.state_dict(), checkpoint_id=f"{folder}/suite-{case.replace('/', '-')}")
        states = [[plain(state) for state in o.state.values()] for o in (optimizers[1], resumed)]
        found[case] = {"losses": losses, "moments": moments, "states": states}
    return found


def plain(state):
    return {key: (v.to_local() if isinstance(v, DTensor) else v).view(torch.uint8).clone() if v.dim() else v.clone()
            for key, v in state.items()}


def placements(rank, folder):
    """What a shard says to a whole state; and a step of a copy whose gradient is still a sum to be made."""
    mesh = init_device_mesh("cpu", (2,))
    whole, shard = torch.ones(8, WIDTH), nn.Parameter(distribute_tensor(torch.ones(8, WIDTH), mesh, [Shard(0)]))
    optimizers = [optim.AdamW([p], 1e-2, state_format="fp32") for p in (nn.Parameter(whole), shard)]
    for optimizer, p in zip(optimizers, (optimizers[0].param_groups[0]["params"][0], shard), strict=True):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    try:
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        said = ""
    except ValueError as error:
        said = str(error)
    copied = nn.Parameter(distribute_tensor(torch.zeros(8, WIDTH), mesh, [Replicate()]))
    copied.grad = DTensor.from_local(torch.full((8, WIDTH), float(rank)), mesh, [Partial()])
    optim.SGD([copied], 1.0).step()
    return said, copied.to_local().detach()


def uneven(rank, folder):
    """Two steps of a layer whose 33 rows two ranks cannot share evenly, as many as torchao's test takes."""
    found = {}
    for case, form in SUITE.items():
        torch.manual_seed(0)
        net = fully_shard(nn.Linear(512, 33))
        optimizer = optim.AdamW(net.parameters(), state_format=form)
        before = net.weight.full_tensor().detach().clone()
        for _ in range(2):
            net(torch.randn(2, 512)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[case] = (net.weight.full_tensor().detach() - before).abs()
    return found
