"""The cost model: its sums by hand, its limits, and what the plan makes of it."""

import math
import sys
from pathlib import Path

import pytest
import sympy
import torch
from torch import nn

from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.lowering.cost import Cost, K, Layer, M, N, break_even, predict
from quartet.lowering.rates import PASSES, Rates, rates_of, shipped
from quartet.options import Options
from quartet.passes.plan import profitability as pays
from quartet.policy import Policy, PolicyError
from quartet.recipes import resolve
from quartet.runtime.capture import Pretence
from quartet.runtime.devices import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "scenarios"))
from harness import compile_eager  # noqa: E402
from models import MLP, Block  # noqa: E402

RATES = Rates("made up", {"bf16": 1e15, "fp8": 2e15}, {"bf16": 1e-12, "fp8": 2e-12},
              dict(zip(PASSES, (1e-12, 2e-12, 3e-12, 5e-12, 7e-12, 11e-12, 13e-12, 17e-12, 19e-12), strict=True)), 1e-6)
ALL = ("fprop", "dgrad", "wgrad")


def kernels(name, roles=ALL):
    return dict.fromkeys(roles, next((kernel for kernel in registry.KERNELS if kernel.name == name), None))


def seconds(counts, products, flops, output):
    """Passes over so many elements, products of so many operations and results."""
    return (sum(RATES.passes[name] * n + RATES.launch for name, n in counts)
            + sum(2 * ops / flops + out * output + RATES.launch for ops, out in products))


X, W, E = 64 * 32, 128 * 32, 64 * 128  # elements at m 64, n 128, k 32
PRODUCTS = [(64 * 128 * 32, E), (64 * 128 * 32, X), (64 * 128 * 32, W)]


def test_quartet_by_hand():
    cost = predict(resolve("quartet"), Layer(kernels("triton-fp8"), 64, 128, 32), RATES)
    passes = [("rows", X), ("rows", W), ("both axes", E), ("fold", E), ("requantise", W), ("fold", W), ("unrotate", X),
              ("fold", E), ("requantise", X), ("fold", X), ("unrotate", W)]
    assert float(cost.quantized) == pytest.approx(seconds(passes, PRODUCTS, 2e15, 2e-12))
    assert float(cost.plain) == pytest.approx(seconds([], PRODUCTS, 1e15, 1e-12))


@pytest.mark.parametrize(("recipe", "passes"), [
    ("fp8", [("amax", X), ("cast", X), ("amax", W), ("cast", W), ("amax", E), ("cast", E)]),
    ("fp8-rowwise", [(name, n) for n in (X, W, E, W, E, X) for name in ("amax", "cast")]),
])
def test_fp8_by_hand(recipe, passes):
    cost = predict(resolve(recipe), Layer(kernels("cublaslt"), 64, 128, 32), RATES)
    assert float(cost.quantized) == pytest.approx(seconds(passes, PRODUCTS, 2e15, 2e-12))


@pytest.mark.parametrize(("level", "passes"), [
    (1, [("unrotate", 2 * n) for n in (X, W, X, W) for _ in range(3)]),  # operands of fprop, and both gradients back
    (2, [("unrotate", 2 * n) for n in (X, W, E, X, X, W) for _ in range(3)]),  # also E of dgrad and its product back
])
def test_rotations_in_generated_code_by_hand(level, passes):
    """An H32 is a store in fp32 and two loops. A rotated E of dgrad is not the E of wgrad: each is cast."""
    cost = predict(resolve(f"halo-fp8-{level}"), Layer(kernels("cublaslt"), 64, 128, 32), RATES)
    casts = [(name, n) for n in (X, W, E, *((E,) if level == 2 else ())) for name in ("amax", "cast")]
    assert float(cost.quantized) == pytest.approx(seconds(casts + passes, PRODUCTS, 2e15, 2e-12))


def test_without_backward_only_forward_counts():
    cost = predict(resolve("quartet"), Layer(kernels("triton-fp8", ("fprop",)), 64, 128, 32), RATES)
    assert float(cost.quantized) == pytest.approx(seconds([("rows", X), ("rows", W)], PRODUCTS[:1], 2e15, 2e-12))
    assert float(cost.plain) == pytest.approx(seconds([], PRODUCTS[:1], 1e15, 1e-12))


def test_a_shared_activation_costs_its_share_and_a_recomputed_product_its_product():
    def quantized(**kwargs):
        return float(predict(resolve("quartet"), Layer(kernels("triton-fp8"), 64, 128, 32, **kwargs), RATES).quantized)

    saved = sum(RATES.passes[name] * X * 2 / 3 for name in ("rows", "requantise", "fold", "unrotate"))
    assert quantized() - quantized(sharing=3, summed=True) == pytest.approx(saved)
    apart = RATES.passes["unrotate"] * X * 2 / 3
    assert quantized(sharing=3) - quantized(sharing=3, summed=True) == pytest.approx(apart)
    again = [("fold", X), ("fold", W)]
    assert quantized(recompute=True) - quantized() == pytest.approx(seconds(again, PRODUCTS[:1], 2e15, 2e-12))


# of an op; those of ONCE are a few a graph
LAUNCHES = {"fp8_cast": 1, "fp8_cast_by_rows": 1, "fp8_casts": 1, "fp8_casts_by_rows": 1, "fp8_scales": 1,
            "fp8_casts_by_known": 3, "cuda_quantize": 1, "cuda_quantize_both": 2, "cuda_requantize": 1, "cuda_fold": 1,
            "unrotate": 1}
ONCE = {"fp8_scale", "sign_table", "fixed_signs", "seed", "amax_begin", "amax_seen", "amax_note", "amax_record"}


class Decoder(nn.Module):
    """Attention with fewer keys and values, and SwiGLU."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(256) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(256, n, bias=False) for n in (256, 64, 64, 256))
        self.gate, self.up, self.down = (nn.Linear(k, n, bias=False) for k, n in ((256, 512), (256, 512), (512, 256)))

    def forward(self, x):
        h = self.norms[0](x)
        q, k, v = (layer(h).unflatten(-1, (-1, 64)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize("name", ["fp8", "fp8-delayed", "quartet"])
def test_launches_are_those_of_the_graphs_that_the_passes_make(name):
    """Of two blocks for an H200; what Inductor generates is left out, and scales of all weights are one launch."""
    found, target = [], Target.named("h200")

    class Seen(Pretence):
        def __call__(self, gm, example_inputs, **kwargs):
            found.extend(node for node in gm.graph.nodes if str(node.target).startswith("quartet."))
            return super().__call__(gm, example_inputs, **kwargs)

    def backend(gm, example_inputs):
        return compile_graph(gm, example_inputs, Options(Policy(name), recompute="none", target=target), Seen(),
                             remember=False)

    model, x = nn.Sequential(Decoder(), Decoder()).bfloat16(), torch.randn(2, 256, 256, dtype=torch.bfloat16)
    torch.compile(model, backend=backend)(x.requires_grad_()).float().square().mean().backward()
    ops = [str(node.target).split(".")[1] for node in found]
    assert set(ops) <= LAUNCHES.keys() | ONCE | {"amax_of_weights"}
    launched = sum(LAUNCHES.get(op, 0) for op in ops) + sum(
        -(-len(node.args[0]) // 8) for op, node in zip(ops, found, strict=True) if op == "amax_of_weights")

    known, recipe = rates_of(target), resolve(name)
    kernel = kernels("triton-fp8" if name == "quartet" else "cublaslt")
    predicted = sum(kernel[role].price(known, recipe, Layer(kernel, 512, n, k, sharing, summed=True), role).launches - 1
                    for n, k, sharing in ((256, 256, 3), (64, 256, 3), (64, 256, 3), (256, 256, 1), (512, 256, 2),
                                          (512, 256, 2), (256, 512, 1)) for role in ALL)
    assert launched == math.ceil(2 * predicted - 1e-6) > 0, (launched, 2 * predicted)


@pytest.mark.parametrize("name", ["cpp", "triton", "inductor", ""])
def test_kernels_that_only_compute_the_numbers_have_no_cost(name):
    assert predict(resolve("quartet"), Layer(kernels(name), 64, 128, 32), RATES) is None


def test_symbols_give_the_same_as_numbers():
    symbolic = predict(resolve("quartet"), Layer(kernels("triton-fp8")), RATES)
    number = predict(resolve("quartet"), Layer(kernels("triton-fp8"), 4096, 1024, 2048), RATES)
    at = {M: 4096, N: 1024, K: 2048}
    assert isinstance(symbolic.quantized, sympy.Expr)
    assert float(symbolic.quantized.subs(at)) == pytest.approx(float(number.quantized))
    assert float(symbolic.plain.subs(at)) == pytest.approx(float(number.plain))


def test_break_even_parts_what_pays_from_what_does_not():
    layer = {"kernels": kernels("triton-fp8"), "m": 16384}
    width = break_even(resolve("quartet"), Layer(**layer), RATES)
    assert 100 < width < 1e6
    for factor, expected in ((0.98, False), (1.02, True)):
        size = int(width * factor)
        assert predict(resolve("quartet"), Layer(**layer, n=size, k=size), RATES).pays is expected
    slow = Rates("slow", {"bf16": 1e15, "fp8": 1e15}, RATES.output, RATES.passes, 1e-6)
    assert break_even(resolve("quartet"), Layer(**layer), slow) == float("inf")


def test_measured_rates_are_whole_and_a_cpu_has_none():
    assert rates_of(Target.of(torch.device("cpu"))) is None
    for rates in shipped.RATES.values():
        assert set(rates.passes) == set(PASSES) and set(rates.flops) == set(rates.output) == {"bf16", "fp8"}
        assert rates.flops["fp8"] > rates.flops["bf16"]


@pytest.fixture
def priced(monkeypatch):
    """This CPU as a device on which a layer pays from 96 outputs on."""
    monkeypatch.setattr(pays, "rates_of", lambda device: RATES)

    monkeypatch.setattr(pays, "predict", lambda recipe, layer, rates: Cost(1.0 if layer.n < 96 else 0.25, 0.5))


def planned(policy, model=None):
    model = model or MLP()
    compiled, backend = compile_eager(model, policy)
    compiled(torch.randn(32, 64)).sum().backward()
    return backend


def test_the_default_leaves_alone_what_would_be_slower(priced):
    backend = planned(Policy("quartet", where_it_pays=True))
    assert set(backend.lowered()) == {"up"} and set(backend.alone()) == {"down"}
    reason = next(r.reason for r in backend.records if r.fqn == "down")
    assert reason == ("would not pay: predicted 1000000 µs quantised, 500000 µs in the model's dtype, forward and "
                      "backward, by rates measured on made up")


def test_what_is_named_is_quantised_whatever_it_costs(priced):
    assert set(planned("quartet").lowered()) == {"up", "down"}
    assert set(planned(Policy(where_it_pays=True).on("down", "quartet")).lowered()) == {"up", "down"}
    assert set(planned(Policy(where_it_pays=True).on("up", None)).lowered()) == set()


def test_sharing_is_counted_from_the_plan(monkeypatch):
    seen = {}
    monkeypatch.setattr(pays, "rates_of", lambda device: RATES)

    def note(recipe, layer, rates):
        seen.setdefault((layer.n, layer.k), layer)

    monkeypatch.setattr(pays, "predict", note)
    compiled, _ = compile_eager(Block(), "auto")
    compiled(torch.randn(2, 8, 64)).sum().backward()
    assert seen[64, 64].sharing == 3 and seen[96, 64].sharing == 2 and seen[64, 96].sharing == 1
    assert seen[96, 64].recompute and not seen[64, 96].recompute  # backward reads gate and up, and not down
    assert seen[64, 64].m == 16
    assert {layer.called for layer in seen.values()} == {1 / 7}  # of the layers of the model


def test_unmeasured_devices_quantise_everything():
    assert set(planned("auto").lowered()) == {"up", "down"}


def test_where_it_pays_is_part_of_the_policy(tmp_path):
    policy = Policy("fp8", where_it_pays=True).on("lm_head", "fp8")
    assert Policy.from_toml(policy.to_toml()) == policy and Policy.from_dict(policy.to_dict()) == policy
    assert policy.digest() != Policy("fp8").on("lm_head", "fp8").digest()
    assert repr(policy).startswith("Policy('fp8', where_it_pays=True).on(") and eval(repr(policy)) == policy
    assert Policy.coerce("auto") == Policy(where_it_pays=True, alternatives=("fp8",))
    with pytest.raises(PolicyError, match="where_it_pays is True or False, not 1"):
        Policy.from_dict({"where_it_pays": 1})
    with pytest.raises(PolicyError, match="did you mean 'auto'"):
        Policy.coerce("aut")
