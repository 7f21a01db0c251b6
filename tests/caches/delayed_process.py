"""Train a tiny model with delayed scaling, compiled by real Inductor or by the stand-in, and print what came of it.

    python delayed_process.py inductor|stand-in
"""

import json
import sys

import torch
from torch._dynamo.utils import counters

import quartet
from quartet.backend import compile_graph
from quartet.options import Options
from quartet.runtime.capture import Capture

SPEC = quartet.QuantSpec.parse("e4m3/tensor fp32 delayed nearest")


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def main(how):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    operand, saved = quartet.Operand(SPEC), quartet.Operand(SPEC, "saved")
    policy = quartet.Policy(quartet.Recipe(
        "delayed", fprop=quartet.Gemm(operand, operand), dgrad=quartet.Gemm(operand, saved),
        wgrad=quartet.Gemm(operand, saved), history=quartet.Delayed(3)))
    model, capture = MLP(), Capture()
    if how == "inductor":
        compiled = torch.compile(model, backend="quartet", options={"policy": policy})
    else:
        compiled = torch.compile(model, backend=lambda gm, x: compile_graph(gm, x, Options(policy=policy), capture))
    losses = []
    for size in (1.0, 4.0, 2.0, 1.0, 1.0, 1.0):
        loss = compiled(torch.randn(48, 32) * size).square().mean()
        loss.backward()
        losses.append(loss.item())
    state = {key: entry["amax"].tolist() for key, entry in quartet.state_dict(model)["delayed"].items()}
    fx, aot = counters["inductor"], counters["aot_autograd"]
    print(json.dumps({"losses": losses, "state": state, "gradient": model.up.weight.grad.abs().sum().item(),
                      "hits": (fx["fxgraph_cache_hit"], aot["autograd_cache_hit"]),
                      "bypass": fx["fxgraph_cache_bypass"] + aot["autograd_cache_bypass"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
