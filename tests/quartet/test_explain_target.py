"""explain(target=…): what would run on a GPU that is not here."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import quartet
from quartet.lowering import registry
from quartet.lowering.rates import PASSES, Rates
from quartet.runtime.devices import Target
from quartet.runtime.gpus import ARCHITECTURES


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def model(dtype=torch.bfloat16):
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype), torch.randn(32, 64).to(dtype)


@pytest.mark.parametrize("target, policy, kernel", [
    ("sm_80", "quartet", "triton"), ("sm_89", "quartet", "triton-fp8"), ("sm_90a", "quartet", "triton-fp8"),
    ("sm_90", "fp8", "cublaslt"), ("sm_80", "int8-all", "int-mm"), ("cpu", "quartet", "cpp"),
    ("cpu", "fp8", "inductor"),
])
def test_kernels_are_those_of_the_target(target, policy, kernel):
    pytest.importorskip("triton")
    module, x = model()
    report = quartet.explain(module, x, options={"policy": policy}, target=target)
    assert {r.kernel for r in report.records} == {kernel} and {r.role for r in report.records} >= {"dgrad", "wgrad"}
    assert target in str(report)
    assert report.saved_bytes_total > 0


@pytest.mark.parametrize("policy", ["quartet", "fp8", "int8-all"])
def test_a_gpu_of_another_vendor_is_explained_with_what_it_would_need(policy):
    module, x = model()
    report = quartet.explain(module, x, options={"policy": policy}, target="gfx950")
    assert {r.kernel for r in report.records} == {"inductor"}
    (note,) = (note for note in report.notes if "AMD" in note)
    assert note == (
        "gfx950 is AMD's: what is quantised runs as code that Inductor generates; missing are fused quantisers, and "
        "products with block-scaled tensor cores, fp8 block scales, fp8 grouped products, fp8 tensor cores, "
        "int8 tensor cores")
    assert note in str(report) and all("AMD" not in note for note in quartet.explain(module, x, target="sm_80").notes)


AMPERE = ("generated code has no e4m3 here: Triton converts to both FP8 formats from compute capability 8.9 on, this "
          "device has 8.0")


def test_another_provider_than_the_preferred_one_is_named_with_the_reason():
    def notes(*disabled):
        x = torch.randn(64, 64, dtype=torch.bfloat16)
        options = {"policy": quartet.Policy("quartet").on("*", "quartet"), "disable_kernels": disabled}
        return quartet.explain(nn.Linear(64, 64, dtype=torch.bfloat16), x, options=options, target="sm_90").notes

    assert not any("cuda_quantize" in note for note in notes())
    (note,) = (note for note in notes("cuda_quantize.triton") if "cuda_quantize" in note)
    assert "cuda_quantize runs as quartet.cuda_quantize.reference: triton: disabled" in note


@pytest.mark.parametrize("policy", ["fp8", "fp8-rowwise", "fp8-block", "fp8-delayed", "fp4-dge", "mxfp8"])
def test_ampere_leaves_alone_what_it_cannot_convert(policy):
    module, x = model()
    report = quartet.explain(module, x, options={"policy": policy}, target="sm_80")
    assert {r.kernel for r in report.records} == {None}
    assert {r.reason for r in report.records} == {f"{AMPERE}; take a recipe in INT8 or MXFP4, or bf16"}
    assert "Triton converts to both FP8 formats" in str(report)


def test_ampere_refuses_it_under_strict():
    module, x = model()
    with pytest.raises(Exception, match=r"strict=True, and 0 .* cannot be quantised: generated code has no e4m3"):
        quartet.explain(module, x, options={"policy": "fp8", "strict": True}, target="sm_80")


def test_ampere_leaves_alone_embeddings_that_it_cannot_convert():
    module = nn.Embedding(64, 32, dtype=torch.bfloat16)
    policy = quartet.Policy("quartet").on("embedding", "fp8-rowwise")
    kernels = {}
    for target in ("sm_80", "sm_89"):
        (row,) = quartet.explain(module, torch.arange(8), options={"policy": policy}, target=target).records
        kernels[target] = row.kernel
        assert target == "sm_89" or row.reason.startswith(AMPERE)
    assert kernels == {"sm_80": None, "sm_89": "reference"}


def test_a_kernel_of_the_users_own_makes_up_for_generated_code():
    class Refused(Exception):
        pass

    def lower(graph, gemms, accepts):
        raise Refused

    module, x = model()
    registry.register(registry.Kernel("own", "", lambda target, dtype, spec, rotation: None, lower))
    try:
        with pytest.raises(Exception) as error:
            quartet.explain(module, x, options={"policy": "fp8"}, target="sm_80")
        assert "Refused" in str(error.value) or isinstance(error.value, Refused)  # it was asked
    finally:
        registry.unregister("own")


def test_the_model_is_as_before_and_can_be_trained():
    pytest.importorskip("triton")
    module, x = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    quartet.explain(module, x, target="sm_90")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.compile(module, backend="quartet", options={"policy": "bf16"})(x).sum().backward()
    assert module[0].weight.grad is not None


def test_sizes_of_other_inputs_make_none_symbolic():
    """Neither those that were explained before, nor those explained by what is compiled afterwards."""
    module, _ = model()
    for tokens in (32, 48, 64):
        report = quartet.explain(module, torch.randn(tokens, 64, dtype=torch.bfloat16))
        assert {r.m for r in report.records if r.role == "fprop"} == {tokens} and report.flops_share() is not None
    seen = []

    def backend(gm, inputs):
        seen.append([tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and t.dim() == 2][-1])
        return gm

    torch.compile(module, backend=backend)(torch.randn(80, 64, dtype=torch.bfloat16))
    assert all(isinstance(size, int) for size in seen[0])
    dynamic = torch.randn(32, 64, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(dynamic, 0)
    assert not isinstance(quartet.explain(module, dynamic).records[0].m, int)


@pytest.mark.parametrize("name", ["sm_75", "sm90", "h101", "sm_90b", "", "cuda"])
def test_a_target_that_does_not_exist_is_refused_with_those_that_do(name):
    module, x = model()
    with pytest.raises(ValueError, match=f"there is no target {name!r}; possible: cpu, sm_80, .*sm_121"):
        quartet.explain(module, x, target=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_target_has_a_kernel_for_mxfp4_and_fp8(name):
    pytest.importorskip("triton")
    for _, format in {(row[0], row[0]) for row in registry.probe(Target.named(name))}:
        taken = [kernel for made, kernel, reason in registry.probe(Target.named(name))
                 if made == format and reason is None]
        without = Target.named(name).capability < (8, 9) and format.startswith(("mx e4m3", "mx e5m2", "fp8"))
        assert bool(taken) is not without, format


def test_what_pays_is_decided_for_the_target(monkeypatch):
    pytest.importorskip("triton")
    slow = Rates("slow", {"bf16": 1e15, "fp8": 1e15}, {"bf16": 0.0, "fp8": 0.0}, dict.fromkeys(PASSES, 1e-12), 1e-6)
    fast = replace(slow, flops={"bf16": 1e9, "fp8": 1e15})
    monkeypatch.setattr("quartet.lowering.rates.shipped.RATES", {"h200": slow, "l40s": fast})
    module, x = model()
    there, elsewhere = (quartet.explain(module, x, target=name) for name in ("sm_90", "l40s"))
    assert {r.kernel for r in there.records} == {None} and "would not pay: predicted" in str(there)
    assert {r.kernel for r in elsewhere.records} == {"cublaslt"}


def test_a_model_on_the_meta_device_is_explained_as_one_that_is_there():
    def made():
        return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.BatchNorm1d(32))

    with torch.device("meta"):
        absent, tokens = made(), torch.zeros(4, 32, dtype=torch.long)
    for target in (None, "b200"):
        options = {"policy": "quartet"}
        report = quartet.explain(absent, tokens, options=options, target=target)
        here = quartet.explain(made(), torch.zeros_like(tokens, device="cpu"), options=options, target=target)
        assert str(report) == str(here) and any(r.lowered for r in report.records)
    assert all(p.is_meta and p.grad is None for p in absent.parameters())


def test_an_evaluation_keeps_nothing():
    with torch.no_grad():
        report = quartet.explain(nn.Linear(64, 64), torch.randn(32, 64))
    assert report.saved_bytes_total == 0
