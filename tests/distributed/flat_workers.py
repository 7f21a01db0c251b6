"""What one of two gloo processes does with FSDP version 1; the test looks at what the ranks return."""

import copy

import torch
from residual_models import MLP, Deep
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

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
    return found
