"""The baseline twice: ``direct.bitnet`` in eager PyTorch and the backend's recipe ``bitnet`` agree."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import net, task  # noqa: E402

from quartet import Policy, direct  # noqa: E402
from quartet.backend import compile_graph  # noqa: E402
from quartet.options import Options  # noqa: E402
from quartet.runtime.capture import Capture  # noqa: E402


def results(model, run):
    x = task()[0].requires_grad_()
    out = run(x)
    out.square().mean().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_eager_layer_is_the_recipe(size):
    torch._dynamo.reset()
    eager = net()
    with torch.no_grad():
        eager.up.weight.mul_(size)
    model, found = copy.deepcopy(eager), []
    policy = Policy("bitnet").on("linear", "bitnet")  # the first layer too, which reads the model's input

    def backend(gm, inputs):
        return compile_graph(gm, inputs, Options(policy=policy), Capture(), found.extend)

    ours = results(model, torch.compile(model, backend=backend))
    theirs = results(direct.bitnet(eager), eager)
    assert {r.fqn.rpartition(".")[2] for r in found if r.role == "fprop" and r.lowered} == {"up", "down"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)
