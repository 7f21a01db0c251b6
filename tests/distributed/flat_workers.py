"""What one of two gloo processes does with FSDP version 1; the test looks at what the ranks return."""

import copy

import torch
from residual_models import MLP, Deep
from torch import nn
from torch._dynamo.backends import registry
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import quartet
from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

TOKENS, WIDTH, HIDDEN = 32, 32, 48


class Backend:
    def __init__(self, policy):
        self.policy, self.records, self.capture = Policy(policy), [], Capture()

    def __call__(self, gm, inputs):
        return compile_graph(gm, inputs, Options(self.policy, strict=True), self.capture, self.records.extend)

    def lowered(self):
        return sorted((record.fqn, record.role) for record in self.records if record.lowered)


def sharded(model, wrapped=False):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"),
                                    auto_wrap_policy=ModuleWrapPolicy({MLP}) if wrapped else None)


def compiled(model, policy="fp8"):
    torch._dynamo.reset()
    backend = Backend(policy)
    model.compile(backend=backend)
    return model, backend


def layers_of_torch(x):
    """What is quantised of a model whose class is PyTorch's own, which dynamo skips as a frame, in each wrapper."""
    def model():
        return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    found = {}
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP1", sharded)):
        torch._dynamo.reset()
        backend = Backend("fp8")
        registry._COMPILER_FNS["quartet"] = lambda gm, inputs, own=backend, **given: own(gm, inputs)
        wrapped = wrap(model())
        assert quartet.compile(wrapped, "fp8") is wrapped
        wrapped(x).sum().backward()
        found[name] = len(backend.lowered())
    try:
        quartet.compile(fully_shard(model()))
    except TypeError as error:
        found["FSDP2"] = str(error)
    return found


def flat(rank, folder):
    torch.manual_seed(0)
    x, model = torch.randn(TOKENS, WIDTH), Deep(WIDTH, HIDDEN)
    run, backend = compiled(copy.deepcopy(model))
    found = {"alone": run(x).detach(), "alone lowered": backend.lowered()}
    for how in ("whole", "blocks"):
        run, backend = compiled(sharded(copy.deepcopy(model), how == "blocks"))
        optimizer = torch.optim.SGD(run.parameters(), 0.1)
        found[how], losses = run(x).detach(), []
        for _ in range(4):
            loss = run(x + rank).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found |= {f"{how} lowered": backend.lowered(), f"{how} losses": losses}
    run, _ = compiled(sharded(copy.deepcopy(model)), "fp8-delayed")
    try:
        run(x)
    except Exception as error:
        found["delayed"] = str(error)
    return found | {"layers of torch.nn": layers_of_torch(x)}
