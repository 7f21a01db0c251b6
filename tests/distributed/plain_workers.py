"""What one of two gloo processes does with tensor parallelism on plain tensors, as Megatron has it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from quartet.backend import compile_graph
from quartet.options import OptionError, Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

WIDTH, TOKENS = 64, 32


class Enter(torch.autograd.Function):
    """The input of split layers: their gradients are added up."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Leave(torch.autograd.Function):
    """The output of split layers: their parts are added up."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Split(nn.Module):
    """A layer that every rank has, and one whose features are divided among them."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(WIDTH, WIDTH, bias=False)
        torch.manual_seed(1 + rank)
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        h = torch.compiler.disable(Enter.apply)(self.shared(x))
        return torch.compiler.disable(Leave.apply)(self.down(self.up(h).relu()))


def plain(rank, folder):
    keys, found = [], {}

    def train(group):
        torch._dynamo.reset()
        options = Options.parse(None, {"policy": "quartet", "same_bits": group})

        def backend(gm, inputs):
            keys.append(options.key())
            return compile_graph(gm, inputs, Options(Policy("quartet"), same_bits=options.same_bits), Capture())

        model = Split(rank)
        run = torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(7)
        x = torch.randn(TOKENS, WIDTH)
        for _ in range(3):
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"shared": model.shared.weight.detach(), "own": model.up.weight.detach()}

    found["none"] = train(None)
    found["ranks"] = train([0, 1])
    found["group"] = train(dist.group.WORLD)
    found["mesh"] = train(init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))["tp"])
    for wrong in ([1 - rank], "tp"):
        try:
            Options.parse(None, {"same_bits": wrong})
        except OptionError as error:
            found[str(wrong)] = str(error)
    found["keys"] = sorted(set(keys))
    return found
