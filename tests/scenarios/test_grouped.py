"""Grouped products of expert weights: each expert is a linear layer quantised by itself, nothing crosses groups."""

import pytest
import torch
import torch.nn.functional as F
from harness import ALL, FIRST, assert_close, assert_same, compile_eager, compile_plain, count, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import quartet
from quartet.extend import Kernel, register_kernel, unregister_kernel
from quartet.kernels import reference
from quartet.kernels.reference.products import grouped
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops import grouped as grouped_ops
from quartet.lowering.recipe.types import Gemm, Operand, Recipe, Rotation
from quartet.policy import Policy
from quartet.policy.possible import obstacle

COUNTS = (5, 0, 33, 1, 11)
EXPERTS, TOKENS = len(COUNTS), sum(COUNTS)
IN, OUT = 80, 48
RECIPES = tuple(name for name, recipe in quartet.recipes().items()
                if recipe.quantizes and obstacle(recipe, "grouped") is None)


def _gemm(spec, source="original", rotation=None, outer=None):
    return Gemm(Operand(QuantSpec.parse(spec)), Operand(QuantSpec.parse(spec), source), rotation, outer)


def _recipe(name, spec, **kwargs):
    gemm = _gemm(spec, **kwargs)
    return Recipe(name, fprop=gemm, dgrad=gemm, wgrad=gemm)


QUEST = "e2m1/32 e8m0 quest(guarded,floor) nearest mask"
HEADROOM = _gemm("e2m1/32 e8m0 headroom nearest", "saved", Rotation(64, (1, -1) * 32))
LOCAL = {  # nothing random, every scale within a row or a block
    "mxfp8": "mxfp8",
    "fp8-rowwise": "fp8-rowwise",
    "fp8-block": "fp8-block",
    "tiles": Recipe("tiles", fprop=_gemm("e4m3/16x16 fp32 amax nearest"), dgrad=_gemm("e4m3/32x32 fp32 amax nearest"),
                    wgrad=_gemm("e4m3/16 fp32 amax_pow2 nearest")),
    "int8-rows": _recipe("int8-rows", "int8/row fp32 amax nearest"),
    "e2m1-rows": _recipe("e2m1-rows", "e2m1/row fp32 amax nearest"),
    "saved-masked-rotated": Recipe("smr", fprop=_gemm(QUEST, rotation=Rotation(32)), dgrad=HEADROOM, wgrad=HEADROOM),
    "saved-again": Recipe("sa", fprop=_gemm("e4m3/32 e8m0 floor nearest mask"), keep_weights=False,
                          dgrad=_gemm("e4m3/64 e8m0 ceil nearest", "saved"),
                          wgrad=_gemm("e5m2/16 e8m0 ceil nearest", "saved")),
    "outer": _recipe("outer", "e4m3/32 e8m0 ceil nearest", outer=Rotation(16)),
}


class Experts(nn.Module):
    """``[tokens, in]`` times the weights of each group; stored ``[E, out, in]`` when ``transposed``."""

    def __init__(self, experts=EXPERTS, transposed=False, dtype=torch.bfloat16):
        super().__init__()
        self.transposed = transposed
        shape = (experts, OUT, IN) if transposed else (experts, IN, OUT)
        self.weight = nn.Parameter((torch.randn(shape, generator=torch.Generator().manual_seed(2)) / 8).to(dtype))

    def forward(self, x, offs):
        w = self.weight.transpose(-2, -1) if self.transposed else self.weight
        return F.grouped_mm(x, w, offs=offs)


class Separate(Experts):
    """The same, one linear layer an expert."""

    def forward(self, x, offs):
        w = self.weight if self.transposed else self.weight.transpose(-2, -1)
        parts = [F.linear(p, w[i]) for i, p in enumerate(x.split(COUNTS)) if len(p)]
        return torch.cat(parts)


def tokens(count=TOKENS, dtype=torch.bfloat16):
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def offsets(counts=COUNTS):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def on(recipe, **where):
    return Policy(None).on("grouped", recipe, **where)


def train(model, policy, x=None, offs=None, seed=1, **options):
    compiled, backend = compile_eager(model, policy, **options)
    return step(compiled, model, (tokens() if x is None else x, offsets() if offs is None else offs), seed), backend


@pytest.mark.parametrize("disable", ([], ["cpp"]))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", LOCAL)
def test_each_expert_is_a_linear_layer_quantised_by_itself(name, transposed, disable):
    recipe = LOCAL[name]
    got, backend = train(Experts(transposed=transposed), on(recipe), disable_kernels=disable)
    assert backend.lowered() == {"weight": ALL}
    separate, other = train(Separate(transposed=transposed), Policy(None).on("linear", recipe), disable_kernels=disable)
    assert sum(r.lowered for r in other.records) == 3 * sum(c > 0 for c in COUNTS)
    assert_same(got, separate)


@pytest.mark.parametrize("name", RECIPES)
def test_one_expert_is_a_linear_layer(name):
    """Also bit for bit what is random, or scaled by the whole tensor: the layouts are then the same."""

    class Linear(Experts):
        def forward(self, x, offs):
            return F.linear(x, self.weight[0] if self.transposed else self.weight[0].t())

    x, offs = tokens(40), torch.tensor([40], dtype=torch.int32)
    got, backend = train(Experts(1), on(name), x, offs, disable_kernels=["cpp"])
    linear, other = train(Linear(1), Policy(None).on("linear", name), tokens(40), offs, disable_kernels=["cpp"])
    assert {(r.role, r.lowered) for r in backend.records} == {(r.role, r.lowered) for r in other.records}
    assert_same(got, linear)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_near_those_in_high_precision(name):
    model = Experts()
    got, backend = train(model, on(name))
    exact = step(compile_plain(model), model, (tokens(), offsets()))
    assert_close((exact[0], got[1]) if name == "bitnet" else got, exact, least=0.8)  # ternary weights halve the outputs
    assert {r.op_class for r in backend.records} == {"grouped"}


@pytest.mark.parametrize("name", ("quartet", "tetrajet", "fp8-rowwise", "mxfp8"))
def test_nothing_crosses_into_another_group(name):
    """What one group holds leaves the other groups' results and gradients as they were, bit for bit."""
    model = Experts()
    x = tokens()
    other = x.detach().clone()
    other[5:38] = 1e4
    compiled, _ = compile_eager(model, on(name))
    (_, a), (_, b) = (step(lambda x, o: compiled(x, o).float().sum(), model, (t, offsets()))
                      for t in (x, other.requires_grad_()))
    rest = [0, 1, 3, 4]
    assert torch.equal(a["weight"][rest], b["weight"][rest]) and not torch.equal(a["weight"][2], b["weight"][2])
    outside = [*range(5), *range(38, 50)]
    assert torch.equal(a["input0"][outside], b["input0"][outside])
    with torch.no_grad():
        y, z = compiled(x, offsets()), compiled(other, offsets())
    assert torch.equal(y[outside], z[outside]) and not torch.equal(y[5:38], z[5:38])


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_of_no_group_are_zeros_and_harmless(name):
    model, counts = Experts(), (5, 0, 3, 1, 0)
    x = tokens().detach()
    clean, dirty = x.clone().requires_grad_(), x.clone()
    dirty[9:] = float("nan")
    dirty[20] = float("inf")
    compiled, _ = compile_eager(model, on(name))
    results = [step(compiled, model, (t, offsets(counts))) for t in (clean, dirty.requires_grad_())]
    assert_same(*results)
    assert compiled(dirty, offsets(counts))[9:].abs().max() == 0 and results[0][1]["input0"][9:].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in results[1][1].values())
    assert results[0][1]["weight"][[1, 4]].abs().max() == 0, "experts without tokens"


@pytest.mark.parametrize("counts", [(50, 0, 0, 0, 0), (0, 0, 0, 0, 50), (0,) * 5, (1,) * 5, (32, 0, 0, 0, 18)])
def test_group_sizes(counts):
    model = Experts()
    got, _ = train(model, on("quartet"), offs=offsets(counts))
    assert all(torch.isfinite(g).all() for g in got[1].values())
    used = torch.tensor(counts) > 0
    assert torch.equal(got[1]["weight"].abs().amax((1, 2)) > 0, used)


@pytest.mark.parametrize("name", ("quartet", "nvfp4", "fp8-rowwise", "halo-fp8-2", "bitnet"))
def test_dynamic_token_counts(name):
    model = Experts()
    compiled, backend = compile_eager(model, on(name), dynamic=True)
    for length, counts in ((50, COUNTS), (64, (1, 2, 3, 4, 54)), (33, (0, 0, 33, 0, 0))):
        x = tokens(length)
        torch._dynamo.mark_dynamic(x, 0)
        got = step(compiled, model, (x, offsets(counts)))
        static, _ = train(model, on(name), tokens(length), offsets(counts), dynamic=False)
        assert_same(got, static)
    assert backend.calls == 1


@pytest.mark.parametrize("name", ("quartet", "nvfp4", "mxfp8"))
def test_checkpointing_replays_the_same_bits(name):
    class Block(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.up, self.down = Experts(), Experts(transposed=True)
            self.out = nn.Parameter((torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5)) / 8).bfloat16())
            self.again = again

        def experts(self, x, offs):
            return self.down(F.silu(self.up(x, offs)) @ self.out, offs)

        def forward(self, x, offs):
            return checkpoint(self.experts, x, offs, use_reentrant=False) if self.again else self.experts(x, offs)

    (plain, _), (again, backend) = (train(Block(again), on(name)) for again in (False, True))
    assert_same(plain, again)
    assert backend.lowered() == {"up": ALL, "down": ALL}
    layouts = sum(str(n.target).startswith("quartet.group_layout") for n in backend.forwards()[0].graph.nodes)
    assert layouts == 1, "both products share the layout of the groups"


def test_policies_by_role():
    policy = Policy("bf16").on("grouped", "quartet", role="forward").on("grouped", "mxfp8", role="wgrad")
    model = Experts()
    got, backend = train(model, policy)
    assert backend.lowered() == {"weight": frozenset({"fprop", "wgrad"})}
    assert {r.role: r.recipe for r in backend.records} == {"fprop": "quartet", "dgrad": "bf16", "wgrad": "mxfp8"}
    assert_close(got, step(compile_plain(model), model, (tokens(), offsets())), least=0.8)


@pytest.mark.parametrize("role", ("fprop", "dgrad", "wgrad"))
def test_a_single_role(role):
    model = Experts(transposed=True)
    policy = Policy(None).on("grouped", "fp8-rowwise", role="forward" if role == "fprop" else role)
    got, backend = train(model, policy)
    assert backend.lowered() == {"weight": frozenset({role})}
    assert_close(got, step(compile_plain(model), model, (tokens(), offsets())), least=0.99)


def test_inputs_without_gradient_have_no_dgrad():
    model = Experts()
    got, backend = train(model, on("quartet"), tokens().detach())
    assert backend.lowered() == {"weight": FIRST} and set(got[1]) == {"weight"}


@pytest.mark.parametrize("recipe, eighths", [("quartet", 0), ("quartet-paper", 1)])
def test_records_say_what_was_done(recipe, eighths):
    _, backend = train(Experts(), on(recipe))
    records = {r.role: r for r in backend.records}
    assert {(r.fqn, r.op_class, r.kernel, r.recipe) for r in backend.records} == {
        ("weight", "grouped", "cpp", recipe)}
    assert {r: (records[r].m, records[r].n, records[r].k) for r in records} == {
        "fprop": (50, OUT, IN), "dgrad": (50, IN, OUT), "wgrad": (OUT, IN, 50)}
    assert all("5 groups, each padded to a multiple of 32 tokens" in r.notes for r in backend.records)
    rows, padded = grouped.padded_rows(50, 5, 32), 96
    assert records["fprop"].saved_bytes == (rows + 5 * OUT) * (padded // 2 + padded // 32 + eighths * padded // 8)
    kept = [n for n in backend.forwards()[0].graph.output_node().args[0][1:] if n.op == "call_function"]
    codes = [n for n in kept if n.meta["val"].dtype == torch.uint8]
    assert sum(n.meta["val"].numel() for n in codes) == records["fprop"].saved_bytes


@pytest.mark.parametrize(("align", "multiple"), [(1, 1), (64, 64)])
def test_groups_are_laid_out_as_the_kernel_of_wgrad_asks(align, multiple):
    model, usual = Experts(), train(Experts(), on("fp8-rowwise"))[0]
    register_kernel(Kernel("mine", "the reference", lambda *asked: None, supports_kind=lambda *asked: None,
                           group_align=align), before="cpp")
    try:
        got, backend = train(model, on("fp8-rowwise"))
    finally:
        unregister_kernel("mine")
    assert {r.kernel for r in backend.records} == {"mine"}
    (made,) = backend.forwards()[0].graph.find_nodes(op="call_function", target=grouped_ops.GROUP_LAYOUT)
    assert made.args[1] == multiple
    assert_same(got, usual)  # zeros behind a group change no row's scale and no sum


def test_the_default_leaves_experts_alone_and_says_so():
    model = Experts()
    got, backend = train(model, "quartet")
    assert backend.alone() == {"weight": ALL} and not backend.lowered()
    assert all("grouped" in r.reason for r in backend.records)
    assert_same(got, step(compile_plain(model), model, (tokens(), offsets())))


def test_straight_through_gradients():
    """BitNet: fprop quantised, both gradients in high precision from what fprop quantised, group by group."""
    got, backend = train(Experts(transposed=True), on("bitnet"))
    assert backend.lowered() == {"weight": frozenset({"fprop"})}
    assert all("straight through" in r.reason for r in backend.records if r.role != "fprop")
    model, x = Experts(transposed=True), tokens()
    recipe = quartet.recipes()["bitnet"]
    a, b = (reference.dequantize(*reference.quantize(t.detach().flatten(0, -2), s)[:2], s, torch.bfloat16)
            for t, s in ((x, recipe.fprop.a.spec), (model.weight, recipe.fprop.b.spec)))
    y = compile_eager(model, on("bitnet"))[0](x, offsets()).detach()
    e = (2 * y.float() / y.numel()).bfloat16()
    for i, (p, g, w) in enumerate(zip(a.split(COUNTS), e.split(COUNTS), b.view_as(model.weight), strict=True)):
        start = sum(COUNTS[:i])
        close(got[1]["weight"][i], g.t() @ p)
        close(got[1]["input0"][start:start + len(p)], g @ w)


def close(a, b):
    """Equal up to the rounding of the gradient that both start from."""
    if b.numel():
        torch.testing.assert_close(a, b, rtol=0.02, atol=float(b.abs().max()) * 0.01)


class Other(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter((torch.randn(shape) / 8).bfloat16())

    def forward(self, x, offs):
        return self.function(x, self.weight, offs)


@pytest.mark.parametrize("function, shape, reason", (
    (lambda x, w, o: F.grouped_mm(w, x.t(), offs=o), (5, 48, IN), "3-D with 2-D"),
    (lambda x, w, o: F.grouped_mm(x.t(), x.detach(), offs=o) @ w, (IN, 8), "2-D with 2-D"),
    (lambda x, w, o: F.grouped_mm(x, x.detach()[:40].reshape(5, 8, IN).transpose(1, 2), offs=o) @ w, (8, 8),
     "activations with activations"),
))
def test_what_is_left_alone_has_a_reason(function, shape, reason):
    model, offs = Other(function, *shape), offsets((8, 0, 32, 16, 8))
    got, backend = train(model, on("quartet"), tokens(64), offs)
    left = [r for r in backend.records if r.op_class == "grouped"]
    assert left and not any(r.lowered for r in left)
    assert any(reason in r.reason for r in left), left
    assert_same(got, step(compile_plain(model), model, (tokens(64), offs)))


def test_strict_refuses_other_forms():
    model = Other(lambda x, w, o: F.grouped_mm(w, x.t(), offs=o), 5, 48, IN)
    with pytest.raises(BackendCompilerFailed, match=r"m=48 n=64 k=80.*3-D with 2-D"):
        train(model, on("quartet"), tokens(64), offsets((8, 0, 32, 16, 8)), strict=True)
    train(model, "quartet", tokens(64), offsets((8, 0, 32, 16, 8)), strict=True)


def test_experts_are_left_alone_by_default_where_nothing_is_known_of_the_device():
    _, backend = train(Experts(), "auto")
    assert {r.reason for r in backend.records} == {
        "grouped is quantised by default where that pays, and no rates of cpu are known: name it in a rule"}
    _, backend = train(Experts(), "quartet")
    assert {r.reason for r in backend.records} == {
        "recipe 'quartet' leaves grouped in high precision unless a rule names it"}
    _, backend = train(Experts(), Policy("quartet", where_it_pays=True).on("grouped", "mxfp8"))
    assert backend.lowered() == {"weight": ALL}


class Wide(nn.Module):
    """Experts of any size, which nothing computes."""

    def __init__(self, experts, wide, out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, wide, out, dtype=torch.bfloat16))

    def forward(self, x, offs):
        return F.grouped_mm(x, self.weight, offs=offs)


@pytest.mark.parametrize("target, name, tokens, sizes, pays", [
    ("h200", "fp8", 32768, (8, 4096, 14336), True), ("h200", "fp8", 16384, (16, 5120, 2048), False),
    ("h200", "quartet", 32768, (8, 4096, 14336), True), ("h200", "quartet", 32768, (64, 2048, 1536), False),
    ("b200", "fp8", 32768, (8, 4096, 14336), False),  # which has no such products of groups
])
def test_experts_are_weighed(target, name, tokens, sizes, pays):
    x = torch.empty(tokens, sizes[1], dtype=torch.bfloat16, requires_grad=True)
    offs = torch.empty(sizes[0], dtype=torch.int32)
    found = quartet.explain(Wide(*sizes), x, offs, target=target,
                            options={"policy": Policy(name, where_it_pays=True)}).records
    assert {r.op_class for r in found} == {"grouped"} and {r.lowered for r in found} == {pays}
    assert all((r.notes[0] if pays else r.reason).startswith("predicted" if pays else "would not pay") for r in found)


class Layer(nn.Module):
    """A mixture of experts with the projections of gate and up apart, beside a shared linear layer."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(IN, IN, bias=False, dtype=torch.bfloat16)
        self.gate, self.up, self.down = Experts(transposed=True), Experts(), Experts()
        self.down.weight = nn.Parameter(self.down.weight.detach().transpose(1, 2).contiguous())

    def forward(self, x, ids):
        routed = (ids >= 0).nonzero().squeeze(1)
        order = routed[ids[routed].argsort(stable=True)]
        offs = ids[routed].bincount(minlength=EXPERTS)[:EXPERTS].cumsum(0).to(torch.int32)
        chosen = x[order]
        y = self.down(F.silu(self.gate(chosen, offs)) * self.up(chosen, offs), offs)
        return self.shared(x).index_add(0, order, y)


def test_a_layer_with_as_many_tokens_as_data_says():
    """Token counts without a bound, shared operands, and linear layers with kernels of their own in one graph."""
    model, ids = Layer(), torch.arange(TOKENS) * 7 % (EXPERTS + 1) - 1
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got, backend = train(model, Policy("quartet").on("grouped", "quartet"), offs=ids)
        assert_close(got, step(compile_plain(model), model, (tokens(), ids)))
    assert backend.lowered() == {"shared": ALL, "gate": ALL, "up": ALL, "down": ALL}
    kernels = {r.fqn: r.kernel for r in backend.records}
    assert kernels.pop("shared") == "cpp" and set(kernels.values()) == {"cpp"}
    (forward,) = backend.forwards()
    assert count(forward, "pad_groups") == 1, "gate and up read one X in the padded layout, and down what stays in it"
    assert (count(forward, "clear_rows"), count(forward, "gather_rows")) == (1, 1)
    assert count(forward, "group_layout") == 1


def test_strict_refuses_what_cannot_be_quantised():
    model = Experts(dtype=torch.bfloat16)
    with pytest.raises(BackendCompilerFailed, match="a size is zero"):
        train(model, on("quartet"), tokens(0), offsets((0,) * 5), strict=True)


class Chosen(nn.Module):
    """Every token with the matrix of its own expert, as batched products of chosen weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, OUT, IN) / 8)

    def forward(self, x, expert):
        return torch.bmm(self.weight[expert], x.float().unflatten(0, (-1, 2)).transpose(1, 2))


def test_weights_chosen_by_data_are_weights():
    model, expert = Chosen(), torch.arange(25) % 4
    compiled, backend = compile_eager(model, on("mxfp8"))
    got = step(compiled, model, (tokens(), expert))
    assert backend.lowered() == {"weight": ALL} and {r.op_class for r in backend.records} == {"grouped"}
    assert_close(got, step(compile_plain(model), model, (tokens(), expert)), least=0.99)


def test_indexed_tables_of_activations_are_no_weights():
    """A table of positions is 2-D: what an index takes of it multiplies as an activation."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.randn(9, 64)), nn.Linear(64, 64)

        def forward(self, index):
            return self.fc(self.table[index])

    model = Positions()
    compiled, backend = compile_eager(model, "quartet")
    step(compiled, model, (torch.arange(40) % 9,))
    assert backend.lowered() == {"fc": ALL}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=7), st.integers(0, 9), st.sampled_from([1, 2, 16, 32, 128]))
def test_layout(counts, unrouted, multiple):
    offs = torch.tensor(counts).cumsum(0)
    total = sum(counts) + unrouted
    ends, source, place = grouped.group_layout(offs, multiple, total)
    assert len(source) == grouped.padded_rows(total, len(counts), multiple) and len(source) % multiple == 0
    assert (ends % multiple == 0).all() and ends[-1] <= len(source)
    room = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    assert room == [-(-c // multiple) * multiple for c in counts]
    start = 0
    for own, end, size in zip(counts, ends.tolist(), room, strict=True):
        assert source[end - size:end].tolist() == [*range(start, start + own)] + [-1] * (size - own)
        start += own
    assert (source[int(ends[-1]):] == -1).all() and (place[start:] == -1).all()
    assert torch.equal(source[place[:start].long()], torch.arange(start, dtype=torch.int32))
    x = torch.randn(total, 3)
    back = grouped.gather_rows(grouped.gather_rows(x, source), place)
    assert torch.equal(back[:start], x[:start]) and (back[start:] == 0).all()


@pytest.mark.parametrize("over_tokens", [False, True])
def test_aten_computes_the_same_product(over_tokens, monkeypatch):
    """The path that a GPU takes in bfloat16, run on a CPU."""
    ends = torch.tensor([32, 32, 96], dtype=torch.int32)
    a = torch.randn(48, 128).bfloat16() if over_tokens else torch.randn(128, 64).bfloat16()
    b = torch.randn(64, 128).bfloat16() if over_tokens else torch.randn(3 * 48, 64).bfloat16()
    expected = grouped.grouped_mm(a, b, ends, over_tokens)
    monkeypatch.setattr(grouped, "_by_aten", lambda x: True)
    got = grouped.grouped_mm(a, b, ends, over_tokens)
    torch.testing.assert_close(got, expected)
    assert got.shape == ((144, 64) if over_tokens else (128, 48))
    empty = got.reshape(3, 48, 64)[1] if over_tokens else got[96:]
    assert (empty == 0).all()


@pytest.mark.parametrize("spec", ("int8/row fp32 amax nearest", "e4m3/row fp32 amax_pow2 nearest",
                                  "e2m1/row fp32 amax nearest"))
def test_rows_have_a_scale_in_each_group(spec):
    q, ends = QuantSpec.parse(spec), torch.tensor([32, 32, 64, 96], dtype=torch.int32)
    x = torch.randn(6, 128) * torch.tensor([1.0, 50.0, 3.0, 0.0]).repeat_interleave(32)
    codes, scales = grouped.quantize_groups(x, q, ends)
    assert scales.shape == (6, 4)
    width = codes.shape[1] // 4
    for group, (start, end) in ((0, (0, 32)), (2, (32, 64)), (3, (64, 96))):
        one_codes, one_scales, _ = reference.quantize(x[:, start:end], q)
        part = slice(start * width // 32, end * width // 32)
        assert torch.equal(codes[:, part].view(torch.uint8), one_codes.view(torch.uint8))
        assert torch.equal(scales[:, group:group + 1], one_scales)
    assert (scales[:, 1] == 1).all()


def test_fakes_are_exact():
    offs = torch.tensor([3, 3, 40], dtype=torch.int32)
    x, w = torch.randn(50, 64), torch.randn(3 * 48, 64)
    ends, source, place = grouped.group_layout(offs, 32, 50)
    xp, check = grouped.gather_rows(x, source), torch.library.opcheck
    utils = ("test_schema", "test_faketensor")
    check(grouped_ops.GROUP_LAYOUT, (offs, 32, 50), test_utils=utils)
    check(grouped_ops.PAD_GROUPS, (x, source), test_utils=utils)
    check(grouped_ops.GATHER_ROWS, (xp, place), test_utils=utils)
    check(grouped_ops.GROUPED_MM, (xp, w, ends, False), test_utils=utils)
    check(grouped_ops.GROUPED_MM, (xp.t(), xp.t(), ends, True), test_utils=utils)
    for spec in ("e2m1/32 e8m0 ceil nearest", "int8/tensor fp32 amax nearest", "e2m1/row fp32 amax nearest"):
        q = QuantSpec.parse(spec)
        a, b = reference.quantize(xp, q), reference.quantize(w, q)
        args = a[0], a[1], b[0], b[1], spec, spec, torch.bfloat16, ends
        check(grouped_ops.SCALED_GROUPED_MM, (*args, False), test_utils=utils)
        if q.block == "row":
            check(grouped_ops.QUANTIZE_GROUPS, (xp.t(), spec, ends), test_utils=utils)
            t = grouped.quantize_groups(xp.t(), q, ends)
        else:
            t = reference.quantize(xp.t(), q)
        args = t[0], t[1], t[0], t[1], spec, spec, torch.bfloat16, ends
        check(grouped_ops.SCALED_GROUPED_MM, (*args, True), test_utils=utils)


def test_inductor_calls_the_op():
    """The real code generator, once: the same codes and the same product as the stand-in."""
    model = Experts()
    expected, _ = train(model, on("fp8-rowwise"), disable_kernels=["cpp"])
    compiled = torch.compile(model, backend="quartet", options={"policy": on("fp8-rowwise")}, fullgraph=True)
    assert_same(step(compiled, model, (tokens(), offsets())), expected)
