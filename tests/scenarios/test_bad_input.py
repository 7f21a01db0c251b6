"""Inputs and options that cannot be: errors say what, where and what to do instead."""

from itertools import pairwise

import pytest
import torch
from harness import compile_eager, step
from models import MLP, Llama, data, tokens
from torch import nn

from quartet import Policy, PolicyError
from quartet.options import OptionError


def test_empty_batch_runs_and_says_that_a_size_is_zero():
    model, x = MLP(), torch.randn(0, 64, requires_grad=True)
    compiled, backend = compile_eager(model)
    out = compiled(x)
    out.sum().backward()
    assert out.shape == (0, 64) and x.grad.shape == (0, 64)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert not backend.lowered() and all("a size is zero (m=0" in r.reason for r in backend.records)


def test_a_dynamic_batch_that_becomes_empty():
    model = MLP()
    compiled, _ = compile_eager(model, dynamic=True)
    step(compiled, model, data(40, 64)())
    assert compiled(torch.randn(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("layer", [nn.Linear(0, 8), nn.Linear(8, 0)])
def test_zero_size_layers(layer):
    compiled, backend = compile_eager(lambda x: layer(x))
    x = torch.randn(4, layer.in_features)
    assert torch.equal(compiled(x), layer(x))
    assert not backend.lowered()


class Parted(nn.Module):
    """The last layer's result is returned in parts, as of queries, keys and values."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(widths)))

    def forward(self, x):
        return self.layers(x).chunk(2, -1)


@pytest.mark.parametrize("policy", ["auto", "quartet"])
@pytest.mark.parametrize("widths", [(64, 48), (0, 64), (64, 0), (64, 0, 64)], ids=str)
@pytest.mark.parametrize("tokens", [0, 40])
def test_zero_sizes_of_a_model(tokens, widths, policy):
    model, x = Parted(*widths), torch.randn(tokens, widths[0], requires_grad=True)
    compiled, backend = compile_eager(model, policy)
    parts, expected = compiled(x), model(x)
    assert [part.shape for part in parts] == [part.shape for part in expected]
    torch.cat(parts, -1).sum().backward()
    if tokens == 0 or 0 in widths:
        assert all(map(torch.equal, parts, expected)) and not backend.lowered()


def test_strict_names_the_matmul_its_sizes_and_the_remedy():
    layer = nn.Linear(64, 48).double()
    compiled, _ = compile_eager(lambda x: layer(x), strict=True)
    with pytest.raises(Exception) as caught:
        compiled(torch.randn(8, 64).double())
    for part in ("strict=True", "layer", "m=8 n=48 k=64", "float64", "cast the module or use autocast"):
        assert part in str(caught.value)


def test_strict_accepts_what_the_policy_leaves_alone():
    model = Llama()
    compiled, backend = compile_eager(model, strict=True)
    step(compiled, model, tokens())
    assert set(backend.alone()) == {"embed", "layers.0", "lm_head"}


def test_a_rule_that_matches_nothing_warns_with_the_nearest_name():
    model, inputs = Llama(), tokens()
    compiled, _ = compile_eager(model, Policy("quartet").on("*.gates", "bf16"))
    with pytest.warns(UserWarning, match=r"matches no matmul; nearest: 'layers\.0\.gate'"):
        step(compiled, model, inputs)


@pytest.mark.parametrize(("options", "message"), [
    ({"polciy": "quartet"}, "unknown option 'polciy'; did you mean 'policy'"),
    ({"disable_passes": "shar"}, "unknown pass 'shar'; did you mean 'share'"),
    ({"disable_passes": ["quantize"]}, "unknown pass 'quantize'"),
    ({"disable_kernels": ["cp"]}, "unknown kernel 'cp'; did you mean 'cpp'"),
    ({"recompute": "gemms"}, "did you mean 'gemm'"),
    ({"strict": 1}, "'strict' is True or False"),
])
def test_unknown_options(options, message):
    with pytest.raises(OptionError) as caught:
        compile_eager(MLP(), **options)
    assert message in str(caught.value)


def test_unknown_policy():
    with pytest.raises(PolicyError, match="did you mean 'quartet'"):
        compile_eager(MLP(), "quartett")


def test_infinite_and_missing_numbers_stay_visible():
    model, (x,) = MLP(), data(40, 64)()
    x[3, 5] = float("nan")
    x[7, 0] = float("inf")
    compiled, _ = compile_eager(model)
    out = compiled(x)
    assert not out[3].isfinite().any() and not out[7].isfinite().any()
    assert out[[0, 1, 2, 4, 5, 6, *range(8, 40)]].isfinite().all()
