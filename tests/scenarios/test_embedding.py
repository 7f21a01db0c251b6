"""Embeddings whose rows are quantised: as the reference quantises the table, and with a gradient that goes straight."""

import pytest
import torch
from harness import assert_close, compile_eager, count, step
from models import Llama, tokens
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from quartet import explain
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.recipe.types import Gemm, Operand, Recipe, Rotation
from quartet.policy import Policy
from quartet.recipes import PolicyError, resolve

MXFP8 = "e4m3/32 e8m0 ceil nearest"
OF_ROWS = (MXFP8, "e5m2/64 e8m0 floor nearest", "e4m3/row fp32 amax_pow2 nearest", "e2m1/16 e4m3 amax nearest",
           "e4m3/128 fp32 amax nearest")
OF_TABLE = ("e4m3/tensor fp32 amax nearest", "e2m1/16x16 e4m3 amax nearest", "e4m3/32x32 fp32 amax nearest",
            "int8/tensor fp32 amax nearest", "ternary/tensor fp32 absmean nearest")
VOCABULARY, WIDTH = 50, 40
SIGNS = tuple(1 - 2 * (i * i // 3 % 2) for i in range(32))


def weight_only(text, rotation=None, name="weight-only"):
    operand = Operand(QuantSpec.parse(text))
    return Recipe(name, fprop=Gemm(operand, operand, rotation))


def turned(x, rotation, **inverse):
    if rotation is None:
        return x
    signs = None if rotation.signs == "none" else torch.tensor(rotation.signs, dtype=torch.float32)
    return reference.hadamard(x, rotation.n, signs, **inverse)


def quantised(table, text, rotation=None):
    """The table as the reference quantises it whole, in the basis of a recipe's rotation."""
    spec, x = QuantSpec.parse(text), table.float()
    x = turned(x, rotation)
    amax = reference.largest_magnitude(x) if spec.takes_amax else None
    codes, scales, mask = reference.quantize(x, spec, amax=amax)
    values = reference.dequantize(codes, scales, spec, table.dtype if rotation is None else torch.float32, amax=amax)
    values = turned(values, rotation, inverse=True, dtype=table.dtype)
    return values[:, :table.shape[1]], mask


def ids(*shape, vocabulary=VOCABULARY):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(5))


def embeddings(backend):
    return [r for r in backend.records if r.op_class == "embedding"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rotation", (None, Rotation(32), Rotation(32, SIGNS)), ids=("", "rotated", "fixed signs"))
@pytest.mark.parametrize("text", (*OF_ROWS, *OF_TABLE))
def test_rows_are_those_of_the_quantised_table(text, rotation, dtype):
    model = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
    recipe = weight_only(text, rotation)
    run, backend = compile_eager(model, Policy(None).on("embedding", recipe))
    x = ids(3, 7)
    expected = quantised(model.weight.detach(), text, rotation)[0][x]
    assert torch.equal(run(x), expected)
    assert run(x).is_contiguous()
    assert not torch.equal(expected, model(x))
    (record, *_) = embeddings(backend)
    assert (record.m, record.n, record.k, record.flops) == (21, WIDTH, VOCABULARY, 0)
    assert record.lowered and record.recipe == "weight-only" and not record.reason


def test_only_a_scale_of_the_table_reads_the_table():
    for text, rows in ((MXFP8, 21), (OF_ROWS[3], 21), (OF_TABLE[0], VOCABULARY)):
        torch._dynamo.reset()
        run, backend = compile_eager(nn.Embedding(VOCABULARY, WIDTH), Policy(None).on("embedding", weight_only(text)))
        run(ids(3, 7))
        (node,) = (n for n in backend.forwards()[0].graph.nodes if "quartet.quantize" in str(n.target))
        assert node.args[0].meta["val"].shape[0] == rows
        assert bool(embeddings(backend)[0].notes) == (rows == VOCABULARY)


@pytest.mark.parametrize("text", (MXFP8, OF_TABLE[0]))
def test_the_gradient_goes_straight_through(text):
    model = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
    run, _ = compile_eager(model, Policy(None).on("embedding", weight_only(text)))
    x = ids(4, 9)
    x[0, 0] = 3
    weights = torch.randn(4, 9, WIDTH)
    (run(x) * weights).sum().backward()
    ours, model.weight.grad = model.weight.grad, None
    (model(x) * weights).sum().backward()
    torch.testing.assert_close(ours, model.weight.grad)
    assert not ours[3].any() and ours[x[1, 0]].any()


@pytest.mark.parametrize("policy", ("quartet-paper", weight_only("e2m1/32 e8m0 floor nearest mask")),
                         ids=("rotated", "unrotated"))
def test_a_clip_mask_clears_the_gradient_in_the_rotated_basis(policy):
    model, x, weights = nn.Embedding(VOCABULARY, WIDTH), ids(4, 9), torch.randn(4, 9, WIDTH)
    gemm = resolve(policy).fprop
    values, mask = quantised(model.weight.detach(), str(gemm.b.spec), gemm.rotation)
    run, _ = compile_eager(model, Policy(None).on("embedding", policy))
    out = run(x)
    assert torch.equal(out, values[x])
    (out * weights).sum().backward()
    exact = torch.zeros(VOCABULARY, WIDTH).index_put_((x,), weights, accumulate=True)
    kept = reference.apply_mask(reference.pad_last(turned(exact, gemm.rotation), 32), mask)
    expected = turned(kept, gemm.rotation, inverse=True)
    torch.testing.assert_close(model.weight.grad, expected[:, :WIDTH], rtol=1e-4, atol=1e-5)
    assert cleared(mask)


def cleared(mask):
    return bool((reference.unpack_bits(mask) == 0).any())


def test_stochastic_rounding_is_unbiased_and_new_every_step():
    model = nn.Embedding(VOCABULARY, WIDTH)
    recipe = weight_only("e2m1/32 e8m0 headroom stochastic", Rotation(32, "random"))
    run, _ = compile_eager(model, Policy(None).on("embedding", recipe))
    x = torch.full((400,), 7)
    with torch.no_grad():
        first, second = run(x), run(x)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    error = first.mean(0) - model.weight.detach()[7]
    assert error.norm() < 0.15 * (first[0] - model.weight.detach()[7]).norm()


def test_a_tied_table_is_quantised_for_the_gather_and_for_the_head():
    model, inputs = Llama(tied=True), tokens()
    policy = Policy("quartet").on("embedding", weight_only(MXFP8)).on("lm_head", "fp8")
    run, backend = compile_eager(model, policy)
    ours = step(run, model, inputs)
    assert_close(ours, step(model, model, inputs), 0.6)
    (record,) = embeddings(backend)
    assert record.fqn == "embed" and record.lowered
    assert any(r.op_class == "lm_head" and r.lowered for r in backend.records)


def test_a_tied_table_with_one_scale_is_quantised_once():
    model, inputs = Llama(tied=True), tokens()
    policy = Policy(None).on("embedding", "fp8").on("lm_head", "fp8")
    run, backend = compile_eager(model, policy, disable_kernels=["cpp"])
    step(run, model, inputs)
    assert count(backend.forwards()[0], "quantize") == 2  # the table, and the input of the head
    head = next(r for r in backend.records if r.op_class == "lm_head")
    assert head.recipe == "fp8" and embeddings(backend)[0].recipe == "fp8"


def test_dynamic_shapes():
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 8))
    run, backend = compile_eager(model, Policy(None).on("embedding", "quartet"), dynamic=True)
    gemm, calls = resolve("quartet").fprop, []
    for batch, length in ((2, 5), (3, 9), (4, 6)):
        x = ids(batch, length)
        expected = model[1](quantised(model[0].weight.detach(), str(gemm.b.spec), gemm.rotation)[0][x])
        ours = run(x)
        torch.testing.assert_close(ours, expected)
        ours.sum().backward()
        calls.append(backend.calls)
    assert len(set(calls)) == 1 and "s" in embeddings(backend)[0].m


def test_a_linear_layer_reads_the_quantised_rows():
    """Also where its operand is the gather itself, without a view in between."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, 64), nn.Linear(64, 32, bias=False))
    run, backend = compile_eager(model, Policy("fp8").on("1", "fp8").on("embedding", weight_only(MXFP8)))
    x = ids(24)
    expected = quantised(model[0].weight.detach(), MXFP8)[0][x] @ model[1].weight.detach().t()
    with torch.no_grad():
        torch.testing.assert_close(run(x), expected, rtol=0.1, atol=0.1)
    ours, plain = step(run, model, (x,)), step(model, model, (x,))
    assert_close(ours, plain, 0.99)
    assert {r.fqn for r in backend.records if r.lowered} == {"0", "1"}


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH))

    def forward(self, x):
        return nn.functional.embedding(x, torch.tanh(self.table) * x.sum(), None)


@pytest.mark.parametrize("make, policy, reason", (
    (lambda: nn.Embedding(VOCABULARY, WIDTH, sparse=True), weight_only(MXFP8), "its gradient is sparse"),
    (lambda: nn.Embedding(VOCABULARY, WIDTH).double(), weight_only(MXFP8), "its table is float64"),
    (Sparse, weight_only(MXFP8), "its table is no parameter"),
    (lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum"), weight_only(MXFP8), "a bag sums rows"),
    (lambda: nn.Embedding(VOCABULARY, WIDTH), "bf16", "rule 0: on('embedding', 'bf16'), which leaves everything"),
))
def test_what_cannot_be_is_left_alone_with_its_reason(make, policy, reason):
    model, x = make(), ids(3, 7)
    run, backend = compile_eager(model, Policy(None).on("embedding", policy))
    torch.testing.assert_close(run(x), model(x))
    (record,) = embeddings(backend)
    assert reason in record.reason and not record.lowered
    run(x).sum().backward()


def test_a_history_is_kept_for_matmuls_only():
    delayed = weight_only("e4m3/tensor fp32 delayed nearest")
    with pytest.raises(PolicyError, match="an embedding keeps no history; possible on op class 'embedding': quartet"):
        Policy(None).on("embedding", delayed)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH))
    run, backend = compile_eager(model, Policy(None).on("0", delayed))
    run(ids(3, 7))
    (record,) = embeddings(backend)
    assert "needs a history" in record.reason and not record.lowered


def test_strict_refuses_what_the_policy_names():
    run, _ = compile_eager(nn.Embedding(VOCABULARY, WIDTH).double(), Policy(None).on("embedding", weight_only(MXFP8)),
                           strict=True)
    with pytest.raises(BackendCompilerFailed, match=r"UnsupportedMatmul: .*\(50 rows of 40, torch.float64\).*float64"):
        run(ids(3))


def test_a_recipe_skips_embeddings_unless_a_rule_names_them():
    model, inputs = Llama(), tokens()
    run, backend = compile_eager(model)
    step(run, model, inputs)
    (record,) = embeddings(backend)
    assert not record.lowered and record.fqn == "embed"
    assert record.reason == "recipe 'quartet' leaves embedding in high precision unless a rule names it"


def test_explain_has_a_row():
    text = str(explain(Llama(), *tokens(), options={"policy": Policy("quartet").on("embedding", "fp8")}))
    (row,) = (line for line in text.splitlines() if line.startswith("embed"))
    assert "embedding" in row and "fp8" in row and "40 × 64 × 64" in row


def test_it_trains():
    model, inputs = Llama(), tokens()
    run, _ = compile_eager(model, Policy("quartet").on("embedding", "quartet"))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        loss = run(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0], losses
