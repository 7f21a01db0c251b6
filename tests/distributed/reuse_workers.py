"""What one of two gloo processes does with quantised weights that serve several forwards of an optimizer step."""

from contextlib import nullcontext

import torch
from residual_models import Deep
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from quartet.backend import compile_graph
from quartet.lowering.targets.cpu import ops as cpu_ops
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

WIDTH, HIDDEN, STEPS, FORWARDS = 64, 96, 4, 3
WEIGHTS = {(HIDDEN, WIDTH), (WIDTH, HIDDEN)}


def seeded(seed=0):
    torch.manual_seed(seed)
    return Deep(WIDTH, HIDDEN)


def backend(reuse):
    capture, options = Capture(), Options(policy=Policy("quartet"), reuse_weights=reuse)
    return lambda gm, inputs: compile_graph(gm, inputs, options, capture)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def load(model, other):
    """The weights of ``other`` as a checkpoint would bring them."""
    mine = model.state_dict()
    model.load_state_dict({name: distribute_tensor(tensor, mine[name].device_mesh, mine[name].placements)
                           if isinstance(mine[name], DTensor) else tensor for name, tensor in other.items()})


def train(model, run, sync, rank):
    """Steps of three forwards each, weights loaded before the third step and within the fourth.

    Args:
        sync: (whether this is a step's last forward) → context of one forward and backward.
    Returns:
        losses, gradients and weights of all steps, and how many weights each step quantised.
    """
    quantized, kernel = [], cpu_ops.cpu.rotate_quantize

    def count(x, **arguments):
        quantized.append(tuple(x.shape))
        return kernel(x, **arguments)

    cpu_ops.cpu.rotate_quantize = count
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = {"values": [], "quantized": []}
    try:
        for step in range(STEPS):
            quantized.clear()
            if step == 2:
                load(model, seeded(1).state_dict())
            for i in range(FORWARDS):
                if (step, i) == (3, 2):
                    load(model, seeded(2).state_dict())
                torch.manual_seed(10 * step + i)
                x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(100 * rank + i))
                with sync(i == FORWARDS - 1):
                    loss = run(x).square().mean()
                    loss.backward()
                found["values"].append(loss.detach())
            found["values"] += [whole(p.grad) for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            found["values"] += [whole(p) for p in model.parameters()]
            found["quantized"].append(sum(shape in WEIGHTS for shape in quantized))
    finally:
        cpu_ops.cpu.rotate_quantize = kernel
    return found


def data_parallel(rank, folder):
    """DDP, whose gradients are reduced with the last forward of a step only."""
    found = {}
    for reuse in (True, False):
        torch._dynamo.reset()
        model = seeded()
        wrapped = DistributedDataParallel(model)
        run = torch.compile(wrapped, backend=backend(reuse))

        def sync(last, wrapped=wrapped):
            return nullcontext() if last else wrapped.no_sync()

        found[reuse] = train(model, run, sync, rank)
    return found


def sharded(rank, folder):
    """FSDP2, gathering weights anew in each forward and backward, or keeping them gathered for a step."""
    found = {}
    for keep in (False, True):
        for reuse in (True, False):
            torch._dynamo.reset()
            model = seeded()
            for layer in model.layers:
                fully_shard(layer, reshard_after_forward=not keep)
            fully_shard(model)
            for layer in model.layers:
                layer.compile(backend=backend(reuse))

            def sync(last, model=model, keep=keep):
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last or not keep)
                return nullcontext()

            found[keep, reuse] = train(model, model, sync, rank)
    return found
