"""What is shared between matmuls, and what forward keeps for backward."""

from dataclasses import replace

import pytest
import torch
from harness import ALL, FIRST, assert_close, assert_same, compile_eager, count, step
from models import BLOCK, MLP, Attention, Block, Llama, Twice, data, tokens

from quartet import Policy, recipes
from quartet.passes import pipeline


def kept(backend):
    """(name of the op that made it, shape, dtype) of what forward leaves, beside inputs and the result."""
    (forward,) = backend.forwards()
    left = forward.graph.output_node().args[0][1:]
    return [(str(n.target), tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in left if n.op == "call_function"]


def test_projections_of_one_input_share_its_quantised_form():
    model = Block()
    compiled, backend = compile_eager(model, disable_kernels=["cpp"], recompute="none")
    step(compiled, model, data(2, 20, 64, grad=True)())
    (forward,), (backward,) = backend.forwards(), backend.backwards()
    assert count(forward, "quantize") == 7 + 4  # weights; inputs of q k v, o, gate up, down
    assert count(forward, "hadamard") == 7 + 4
    assert count(backward, "quantize") == 7 * 2 + 7 + 4  # dgrad E and W; wgrad Eᵀ, and Xᵀ shared
    assert count(forward, "scaled_mm") == 7 and count(backward, "scaled_mm") == 14


def test_the_share_pass_changes_no_bit():
    model, inputs = Block(), data(2, 20, 64, grad=True)()
    shared, alone = (compile_eager(model, disable_kernels=["cpp"], disable_passes=names)[0]
                     for names in (["sum_first"], ["sum_first", "share"]))  # sum_first finds what share has made one
    assert_same(step(alone, model, inputs), step(shared, model, inputs))


def test_a_weight_used_twice_is_quantised_once():
    model, inputs = Twice(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, disable_kernels=["cpp"])
    step(compiled, model, inputs)
    assert count(backend.forwards()[0], "quantize") == 3
    assert {r.site for r in backend.records} == {0, 1}


CODES = [(64, 32), (64, 2),  # codes and scales of X
         (64, 48), (64, 3), (64, 48), (64, 3)]  # of the hidden values and of W₂
MASKS = [(64, 12), (64, 12),  # of the hidden values and of W₂; no dgrad needs that of X
         (96, 8)]  # of W₁, for its wgrad


@pytest.mark.parametrize("recipe, wanted", [("quartet", CODES), ("quartet-paper", CODES + MASKS)])
def test_codes_scales_and_masks_are_kept_and_the_inputs_are_not(recipe, wanted):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = MLP(64, 96, 64)

        def forward(self, x):
            return self.mlp(torch.tanh(x)).relu()

    model = Two()
    compiled, backend = compile_eager(model, recipe)
    step(compiled, model, data(64, 64)())
    packed = [entry for entry in kept(backend) if entry[2] == torch.uint8]
    assert sorted(shape for _, shape, _ in packed) == sorted(wanted)
    assert not [entry for entry in kept(backend) if entry[2] != torch.uint8 and "tanh" in entry[0]]
    record = next(r for r in backend.records if (r.fqn, r.role) == ("mlp.down", "fprop"))
    assert record.saved_bytes == 2 * 64 * (48 + 3 + 12 * (recipe == "quartet-paper"))


def test_weights_quantised_again_in_backward_take_no_memory():
    recipe = replace(recipes()["quartet"], name="lean", keep_weights=False)
    model, inputs = MLP(64, 96, 64), data(2, 20, 64, grad=True)()
    compiled, with_weights = compile_eager(model, recompute="none")
    expected = step(compiled, model, inputs)
    compiled, backend = compile_eager(model, recipe)
    assert_same(step(compiled, model, inputs), expected)
    assert with_weights.capture.saved_bytes - backend.capture.saved_bytes == 2 * 64 * 96 * 17 // 32
    assert backend.lowered() == {"up": ALL, "down": ALL}


@pytest.mark.parametrize("name", pipeline.OPTIONAL)
def test_every_optional_pass_can_be_left_out(name):
    model, inputs = Attention(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, disable_passes=[name])
    got = step(compiled, model, inputs)
    assert_close(got, step(model, model, inputs))
    assert backend.lowered() == {"mha.in_proj_weight": ALL, "mha.out_proj": ALL}


def test_roles_of_a_policy_decide_each_product():
    policy = Policy("quartet").on("down", "bf16", role="fprop").on("up", None, role="wgrad")
    model, inputs = MLP(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, policy)
    got = step(compiled, model, inputs)
    assert backend.lowered() == {"up": frozenset({"fprop", "dgrad"}), "down": frozenset({"dgrad", "wgrad"})}
    assert_close(got, step(model, model, inputs))
    notes = {(r.fqn, r.role): r.notes for r in backend.records}
    for role in ("dgrad", "wgrad"):
        assert "operand b from the original tensor, because fprop is in high precision" in notes["down", role][-1]
    assert "rule 1" in next(r.reason for r in backend.records if (r.fqn, r.role) == ("up", "wgrad"))


def test_a_rule_lowers_the_head():
    model, inputs = Llama(tied=True), tokens()
    compiled, backend = compile_eager(model, Policy("quartet").on("lm_head", "quartet"))
    got = step(compiled, model, inputs)
    assert backend.lowered() == {**BLOCK, "lm_head": ALL}
    assert_close(got, step(model, model, inputs), least=0.5)
    assert {r.op_class for r in backend.records if r.fqn == "lm_head"} == {"lm_head"}


def test_frozen_first_layer_has_no_product_in_backward():
    model = MLP()
    model.up.requires_grad_(False)
    compiled, backend = compile_eager(model)
    step(compiled, model, data(40, 64)())
    assert backend.lowered() == {"up": frozenset({"fprop"}), "down": FIRST}
