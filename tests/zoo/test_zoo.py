"""A training step of real architectures with quantised layers, against the same step in eager.

A dozen by default; all with ``QUARTET_ZOO=all`` (``make zoo``).
"""

import os

import pytest
import torch
from architectures import ARCHITECTURES, COMMON, Specimen
from torch import nn
from torch.nn.functional import cosine_similarity

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

CHOSEN = ARCHITECTURES if os.environ.get("QUARTET_ZOO") == "all" else COMMON


def linear_layers(model):
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | conv1d)}


def step(run, specimen):
    """(loss, gradients by name) of a forward and backward of every call."""
    specimen.model.zero_grad()
    torch.manual_seed(1)
    total = torch.zeros(())
    for call in specimen.calls:
        loss = Specimen.loss(run(**call))
        loss.backward()
        total += loss.detach()
    return total, {n: p.grad.clone() for n, p in specimen.model.named_parameters() if p.grad is not None}


def called(specimen):
    """Names of the linear layers that are called as modules."""
    seen, hooks = set(), []
    for name, module in linear_layers(specimen.model).items():
        hooks.append(module.register_forward_hook(lambda *_, name=name: seen.add(name)))
    step(specimen.model, specimen)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module", params=list(CHOSEN))
def trained(request):
    """(specimen, layers called, eager step, quantised step, records)"""
    library = request.param.split()[0]
    if library in ("timm", "diffusers", "peft"):
        pytest.importorskip(library)
    torch._dynamo.reset()
    torch.manual_seed(0)
    specimen = ARCHITECTURES[request.param]()
    specimen.model.train()
    layers, records = called(specimen), []

    def backend(gm, inputs):
        return compile_graph(gm, inputs, Options(Policy("quartet")), inner_compile=Capture(), collect=records.extend)

    eager = step(specimen.model, specimen)
    compiled = torch.compile(specimen.model, backend=backend, dynamic=len(specimen.calls) > 1)
    with torch._dynamo.config.patch(recompile_limit=64):
        return specimen, layers, eager, step(compiled, specimen), records


def test_loss_is_near_eager(trained):
    _, _, (eager, _), (loss, _), _ = trained
    assert torch.isfinite(loss) and abs(loss - eager) < 0.3 * eager.abs() + 1e-2


def test_every_gradient_exists_and_is_finite(trained):
    _, _, (_, eager), (_, ours), _ = trained
    assert ours.keys() == eager.keys()
    assert [name for name, grad in ours.items() if not torch.isfinite(grad).all()] == []


def test_gradient_points_the_same_way(trained):
    _, _, (_, eager), (_, ours), _ = trained
    a, b = (torch.cat([g[k].flatten() for k in sorted(eager)]) for g in (eager, ours))
    assert cosine_similarity(a, b, dim=0) > 0.5


def test_every_linear_layer_has_a_row_under_its_name(trained):
    specimen, layers, _, _, records = trained
    rows = {record.fqn for record in records if record.role == "fprop"}
    assert layers and layers <= rows, sorted(layers - rows)


def test_no_row_has_another_name(trained):
    specimen, _, _, _, records = trained
    names = {name for name, _ in (*specimen.model.named_modules(), *specimen.model.named_parameters())}
    assert {record.fqn for record in records} <= names
