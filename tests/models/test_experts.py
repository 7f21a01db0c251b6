"""Mixture-of-experts models of Hugging Face: one training step with quantised experts, in each form that they offer."""

import os

import pytest
import torch
from torch.nn.functional import cosine_similarity

from quartet import explain
from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.options import Options
from quartet.passes import pipeline
from quartet.policy import Policy
from quartet.runtime.capture import Capture

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY, TOKENS, EXPERTS = 128, 32, 4
DECODER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
               num_key_value_heads=2, vocab_size=VOCABULARY, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
ZOO = {
    "mixtral": ("Mixtral", dict(num_local_experts=EXPERTS)),
    "qwen3": ("Qwen3Moe", dict(head_dim=16, num_experts=EXPERTS, moe_intermediate_size=48)),
    "deepseek": ("DeepseekV3", dict(num_key_value_heads=4, n_routed_experts=EXPERTS, n_shared_experts=1, n_group=2,
                                    moe_intermediate_size=48, topk_group=1, first_k_dense_replace=0, **LATENT)),
    "gpt-oss": ("GptOss", dict(head_dim=16, num_local_experts=EXPERTS)),
}
BOTH = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
ALL = {"fprop", "dgrad", "wgrad"}


def build(name, form, dtype):
    torch.manual_seed(0)
    kind, sizes = ZOO[name]
    config = getattr(transformers, f"{kind}Config")(**(DECODER | sizes))
    config.use_cache = False
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).train()
    model.set_experts_implementation(form)
    return model


def step(run, model):
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    torch.manual_seed(2)
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    return float(loss.detach()), [n for n, _ in named], torch.cat([g.float().flatten() for _, g in named])


def train(name, form, dtype, policy):
    """Records of a compiled step, after it was compared with the same step in eager."""
    torch._dynamo.reset()
    model, records = build(name, form, dtype), []
    options = Options.parse(None, {"policy": policy}, passes=pipeline.OPTIONAL, kernels=registry.NAMES)

    def backend(gm, inputs):
        return compile_graph(gm, inputs, options, inner_compile=Capture(), collect=records.extend)

    loss, names, exact = step(model, model)
    ours, same_names, gradients = step(torch.compile(model, backend=backend), model)
    assert abs(ours - loss) < 0.1 * loss and same_names == names
    assert torch.isfinite(gradients).all()
    assert 0.7 < cosine_similarity(gradients, exact, dim=0) < 0.99999
    routers = [r for r in records if r.op_class == "router"]
    assert routers and not any(r.lowered for r in routers)
    return records


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype, recipe", [(torch.bfloat16, "nvfp4"), (torch.float32, "quartet")])
def test_grouped_experts(name, dtype, recipe):
    """bfloat16 compiles to ``aten._grouped_mm``; float32, on older PyTorch, to an op of Hugging Face's."""
    records = train(name, "grouped_mm", dtype, Policy("quartet").on("grouped", recipe))
    experts = [r for r in records if r.op_class == "grouped"]
    assert {r.fqn for r in experts} == BOTH and len(experts) == 6
    assert {r.role for r in experts} == ALL
    assert {(r.recipe, r.kernel) for r in experts} == {(recipe, {"nvfp4": "grouped-mm", "quartet": "cpp"}[recipe])}


@pytest.mark.parametrize("name", ZOO)
def test_batched_experts(name):
    """Each token multiplies a copy of its expert's weights; their gradient is an outer product, and no matmul."""
    records = train(name, "batched_mm", torch.float32, Policy("quartet").on("grouped", "mxfp8"))
    experts = [r for r in records if r.op_class == "grouped"]
    assert {r.fqn for r in experts} == BOTH
    assert {(r.role, r.batch, r.recipe) for r in experts if r.lowered} == {
        (role, 2 * 2 * TOKENS, "mxfp8") for role in ("fprop", "dgrad")}


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ZOO)
def test_the_default_leaves_experts_in_high_precision(name, form):
    experts = [r for r in train(name, form, torch.bfloat16, "quartet") if r.op_class == "grouped"]
    assert {r.fqn for r in experts} == BOTH
    assert all(not r.lowered and "grouped" in r.reason for r in experts)


def test_eager_experts_run_outside_of_the_graphs():
    """A loop over the experts that have tokens breaks the graph: what it multiplies never reaches a compiler."""
    records = train("mixtral", "eager", torch.float32, Policy("quartet").on("grouped", "nvfp4"))
    assert not [r for r in records if "experts" in r.fqn or r.op_class == "grouped"]
    assert {r.fqn.rsplit(".", 1)[-1] for r in records if r.lowered} >= {"q_proj", "o_proj"}


@pytest.mark.parametrize("name, dense", [("mixtral", "*.self_attn.*_proj"), ("deepseek", "*.shared_experts.*")])
def test_one_model_under_four_recipes(name, dense):
    """Attention in MXFP8 as far as its mask lets it, dense layers in MXFP4, the head in bfloat16, experts in NVFP4."""
    torch._dynamo.reset()
    model, records = build(name, "grouped_mm", torch.bfloat16), []
    policy = (Policy(None).on(dense, "quartet", op="linear").on("attention", "mxfp8").on("lm_head", "bf16")
              .on("grouped", "nvfp4"))
    choice = {"policy": policy, "open_attention": True}
    options = Options.parse(None, choice, passes=pipeline.OPTIONAL, kernels=registry.NAMES)
    run = torch.compile(model, backend=lambda gm, inputs: compile_graph(
        gm, inputs, options, inner_compile=Capture(), collect=records.extend))
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > 4.5 and losses[-1] < losses[0] - 1.5, losses
    expected = {"linear": {"quartet"}, "attention_qk": {"mxfp8"}, "attention_pv": {"mxfp8"}, "grouped": {"nvfp4"}}

    def recipes_of(rows):
        return {op: {r.recipe for r in rows if r.op_class == op and r.lowered} for op in {r.op_class for r in rows}
                if any(r.lowered for r in rows if r.op_class == op)}

    assert recipes_of(records) == expected
    report = explain(model, input_ids=ids, labels=ids, options=choice)
    assert recipes_of(report.records) == expected
    (head,) = {r.reason for r in report.records if r.op_class == "lm_head"}
    assert "'bf16'" in head and all(f" {recipe} " in str(report) for recipe in ("quartet", "mxfp8", "nvfp4"))
    assert {r.role for r in report.records if r.op_class == "grouped" and r.lowered} == ALL
