"""torch.compile sees through the parameter type: the same numbers as eager, and training goes on after a step."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from direct_models import assert_same, net, stored, task, train, wrapped  # noqa: E402

import quartet  # noqa: E402
from quartet.backend import quartet as backend  # noqa: E402


def gradients(model, run):
    run(task()[0]).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor", backend], ids=["aot", "inductor", "quartet"])
@pytest.mark.parametrize("bits, paper", [("ternary", False), (4, True), (8, False)])
def test_compiled_is_eager(compiler, bits, paper):
    torch._dynamo.reset()
    model = net(bits, paper=paper, skip=())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    assert torch.allclose(compiled(task()[0]), twin(task()[0]), atol=1e-6)
    for a, b in zip(gradients(model, compiled), gradients(twin, twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits, paper", [("ternary", False), (8, True)])
def test_activations_as_they_are_compile_too(bits, paper):
    torch._dynamo.reset()
    model = net(bits, paper=paper, activations=None)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(model, compiled), gradients(twin, twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_is_seen_without_compiling_again():
    torch._dynamo.reset()
    calls = []

    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def counting(gm, inputs):
        calls.append(gm)
        return aot_eager(gm, inputs)

    model, twin = net(8), net(8)
    compiled = torch.compile(model, backend=counting)
    losses = train(model, wrapped(model), 6, compiled)
    assert losses == train(twin, wrapped(twin), 6)
    assert_same(stored(model), stored(twin))
    assert len(calls) == 1


def test_the_backend_leaves_integer_products_alone_and_quantises_others():
    torch._dynamo.reset()
    named = quartet.Policy("quartet").on("linear", "quartet")  # or codes as weights would be left alone as well
    for activations, lowered in (("int8", set()), (None, {"up", "down"})):
        model = net(8, activations=activations)
        report = quartet.explain(model, task()[0], options={"policy": named})
        found = {r.fqn.removeprefix("L.") for r in report.records if r.role == "fprop" and r.lowered}
        assert {name for name in ("up", "down") if any(f.endswith(name) for f in found)} == lowered
