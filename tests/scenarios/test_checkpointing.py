"""Activation checkpointing replays the same random bits: gradients are those without it, bit for bit."""

from functools import partial

import pytest
import torch
from harness import ALL, assert_same, compile_eager, step
from models import Residual, data
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LOWERED = {f"blocks.{i}.1.{name}": ALL for i in (0, 1) for name in ("up", "down")}
MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def plain(block, x):
    return block(x)


def recomputed(block, x):
    return checkpoint(block, x, use_reentrant=False)


def selective(policy):
    def decide(context, op, *args, **kwargs):
        return policy if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda block, x: checkpoint(block, x, use_reentrant=False,
                                       context_fn=partial(create_selective_checkpoint_contexts, decide))


def run(wrap, **options):
    torch.manual_seed(5)
    model = Residual(wrap)
    compiled, backend = compile_eager(model, **options)
    result = step(compiled, model, data(40, 64, grad=True)())
    assert backend.lowered() == LOWERED
    return result, backend


def kept(backend):
    """What the forward leaves for backward, beside its inputs and its result."""
    (forward,) = backend.forwards()
    return [n for n in forward.graph.output_node().args[0][1:] if n.op == "call_function"]


@pytest.mark.parametrize("kernels", [(), ("cpp",)])
def test_inside_the_compiled_region(kernels):
    expected, without = run(plain, disable_kernels=kernels)
    got, backend = run(recomputed, disable_kernels=kernels)
    assert_same(got, expected)
    assert backend.capture.saved_bytes < 0.6 * without.capture.saved_bytes
    assert backend.count("seed") == 1


@pytest.mark.parametrize("kernels", [(), ("cpp",)])
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE,
                                    CheckpointPolicy.MUST_RECOMPUTE])
@pytest.mark.parametrize("recompute", ["gemm", "none"])
def test_selective_policy(policy, recompute, kernels):
    """What is saved of a product: codes where backward runs it again from them, else its output."""
    options = {"disable_kernels": kernels, "recompute": recompute}
    got, backend = run(selective(policy), **options)
    assert_same(got, run(plain, **options)[0])
    saved = policy is not CheckpointPolicy.MUST_RECOMPUTE
    products = [n for n in kept(backend) if "mm" in str(n.target)]
    assert len(products) == (3 if saved and recompute == "none" else 0)  # nothing reads the last one's output
    assert not [n for n in kept(backend) if "hadamard" in str(n.target)]
    assert any(n.meta["val"].dtype == torch.uint8 for n in kept(backend)) == (saved and recompute == "gemm")


@pytest.mark.parametrize("recipe", ["quartet", "fp8", "bf16"])
def test_saving_products_keeps_no_more_than_no_checkpointing(recipe):
    kept = []
    for wrap in (plain, selective(CheckpointPolicy.MUST_SAVE), recomputed):
        torch._dynamo.reset()
        model = Residual(wrap)
        compiled, backend = compile_eager(model, recipe)
        step(compiled, model, data(160, 64, grad=True)())
        kept.append(backend.capture.saved_bytes)
    none, some, full = kept
    assert full < some < none, kept


def test_a_memory_budget_draws_the_seed_once():
    expected, without = run(plain)
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        got, backend = run(plain)
    assert_same(got, expected)
    assert backend.count("seed") == 1 and backend.capture.saved_bytes < without.capture.saved_bytes


def test_outside_of_the_compiled_region():
    torch.manual_seed(5)
    model, x = Residual(plain), data(40, 64, grad=True)()
    _, backend = compile_eager(model)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    expected = step(model, model, x)
    model.wrap = recomputed
    assert_same(step(model, model, x), expected)
    assert {name.removeprefix("1."): roles for name, roles in backend.lowered().items()} == {"up": ALL, "down": ALL}


def test_recomputing_the_gemm_saves_bytes_and_changes_no_bit():
    expected, without = run(plain, recompute="none")
    got, backend = run(plain)  # the recipe's own choice is "gemm"
    assert_same(got, expected)
    assert backend.capture.saved_bytes < 0.8 * without.capture.saved_bytes
