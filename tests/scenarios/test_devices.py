"""Devices: several in one graph, none, a missing one; and what must not depend on whether a cache answered."""

from dataclasses import replace

import pytest
import torch
from harness import assert_same, compile_eager, cosine, step
from models import MLP, data
from torch import nn

import quartet
from quartet.cli import doctor
from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.runtime.devices import Target


class TwoDevices(nn.Module):
    def __init__(self):
        super().__init__()
        # torch.compile fails where a result on meta has the sizes of a gradient
        self.here, self.there = MLP(), MLP(out=96).to("meta")

    def forward(self, x, y):
        return self.here(x), self.there(y)


@pytest.mark.parametrize("meta_first", [False, True])
def test_a_graph_on_two_devices_gives_each_matmul_the_kernels_and_the_random_bits_of_its_own(meta_first):
    model, (x,) = TwoDevices(), data(40, 64, grad=True)()

    def run(x, y):
        there = model.there(y) if meta_first else None
        return model.here(x), model.there(y) if there is None else there

    compiled, backend = compile_eager(run)
    alone, _ = compile_eager(model.here)

    def gradients(f):
        torch.manual_seed(1)
        return torch.autograd.grad(f(x).square().mean(), [x, *model.here.parameters()])

    found = gradients(lambda x: compiled(x, torch.empty(40, 64, device="meta", requires_grad=True))[0])
    kernels = {r.fqn.split(".")[-2]: r.kernel for r in backend.records}
    assert kernels == {"here": "cpp", "there": "reference"}
    wanted = gradients(alone)
    assert all(cosine(a, b) > 0.9 for a, b in zip(found, wanted, strict=True))
    if not meta_first:  # the bits of a matmul are named by its place in the graph
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_no_kernel_takes_says_why():
    model = TwoDevices()
    for _ in range(2):
        torch._dynamo.reset()
        compiled, backend = compile_eager(model)
        compiled(torch.randn(40, 64), torch.empty(40, 64, device="meta"))
        there = [r for r in backend.records if r.fqn.startswith("there")]
        assert there and {r.kernel for r in there} == {"reference"}
        assert all("cpp: runs on a CPU, not on meta" in r.notes[-1] for r in there)


def test_a_missing_gpu_has_no_kernel_and_says_that_it_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = registry.probe(torch.device("cuda", 1))
    assert rows and all("no CUDA device is here" in reason for _, _, reason in rows)
    for recipe in ("quartet", "fp8"):
        gemm = quartet.recipes()[recipe].fprop
        specs = (gemm.a.spec, 0), (gemm.b.spec, 0)
        kernel, reasons = registry.choose(torch.device("cuda", 1), torch.bfloat16, specs)
        assert kernel is None and set(reasons) == set(registry.NAMES)
    assert "no CUDA device is here" in Target.of(torch.device("cuda")).lacks("fp8 tensor cores")


def test_a_gpu_beyond_the_last_is_named_with_the_legal_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert {reason for _, _, reason in registry.probe(torch.device("cuda", 2))} == {
        "no such device: 2 CUDA devices are visible, cuda:0 to cuda:1"}


def test_doctor_survives_a_gpu_that_does_not_answer(monkeypatch):
    def gone(index):
        raise RuntimeError("CUDA error: unknown error\nsecond line")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gone)
    found = doctor.doctor()
    assert "cuda:0 (does not answer: CUDA error: unknown error)" in found.text(verbose=True) and not found.healthy


def test_explain_after_a_step_that_the_cache_kept_still_lists_every_matmul():
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    with torch._functorch.config.patch(enable_autograd_cache=True):
        torch.compile(model, backend="quartet")(x).sum().backward()
        for _ in range(2):
            torch._dynamo.reset()
            assert [r.role for r in quartet.explain(model, x).records] == ["fprop", "wgrad"]


def test_a_dump_is_written_although_the_caches_know_the_graph(tmp_path):
    model, x = nn.Linear(64, 64), torch.randn(32, 64)
    with torch._functorch.config.patch(enable_autograd_cache=True):
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(model, backend="quartet", options={"dump": str(tmp_path / "d")})(x).sum().backward()
    assert len(list((tmp_path / "d").rglob("matmuls.json"))) == 2


@pytest.mark.parametrize("operand", ["a", "b"])
@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_gemm_of_two_element_formats_beside_others_that_the_cpu_kernels_take(role, operand, dynamic):
    recipe = quartet.recipes()["quartet"]
    gemm = getattr(recipe, role)
    wider = replace(getattr(gemm, operand), spec=QuantSpec(element="e4m3", rule="ceil"))
    mixed = replace(recipe, name="mixed", **{role: replace(gemm, **{operand: wider})})
    model, inputs = MLP(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, quartet.Policy(mixed), dynamic=dynamic)
    found = step(compiled, model, inputs)
    others = {"fprop", "dgrad", "wgrad"} - {role}
    assert {(r.role, r.kernel) for r in backend.records} == {(role, "inductor"), *((o, "cpp") for o in others)}
    plain, _ = compile_eager(model, quartet.Policy(mixed), dynamic=dynamic, disable_kernels=["cpp"])
    assert_same(found, step(plain, model, inputs))
