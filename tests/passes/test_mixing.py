"""Which products mix the heads of scores, and which only look like it."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from quartet.passes.classify.mixing import mixed_heads
from quartet.passes.matrices import MATMULS

SCORES, SQUARE = (2, 4, 8, 8), (2, 8, 8, 8)  # batch, heads, queries, keys
HEADS, TOKENS = (4, 4), (8, 8)


def found(function, *sizes, target=MATMULS):
    gm = make_fx(function, tracing_mode="fake")(*map(torch.ones, sizes))
    return [mixed_heads(node) for node in gm.graph.nodes if node.target in target][-1]


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("mix", [
    lambda s, m: F.linear(s.permute(0, 2, 3, 1), m), lambda s, m: F.linear(s.permute(0, 2, 3, 1), m, m[0]),
    lambda s, m: s.permute(0, 2, 3, 1) @ m, lambda s, m: torch.einsum("bhij,gh->bgij", s, m),
    lambda s, m: torch.einsum("gh,bhij->bgij", m, s)])
def test_heads_that_are_mixed(mix, batch):
    assert found(mix, (batch, *SCORES[1:]), HEADS) is not None


@pytest.mark.parametrize(("mix", "scores", "matrix"), [
    (lambda s, m: s @ m, SCORES, TOKENS), (lambda s, m: m @ s, SCORES, TOKENS),
    (lambda s, m: torch.einsum("bhij,ki->bhkj", s, m), SQUARE, TOKENS),
    (lambda s, m: torch.einsum("ki,bhij->bhkj", m, s), SQUARE, TOKENS),
    (lambda s, m: torch.einsum("bhij,kj->bhik", s, m), SQUARE, TOKENS),
    (lambda s, m: F.linear(s.permute(1, 2, 0), m), (8, 2, 16), TOKENS),  # tokens, as the first axis
    (lambda s, m: F.linear(s.mT, m), (2, 8, 16), TOKENS),
    (lambda s, m: s.transpose(1, 2) @ m, (2, 8, 4, 8), TOKENS),  # within heads, as wide as they are many
    (lambda s, m: s @ m.mT, SCORES, SCORES)])
def test_what_mixes_tokens_or_a_heads_width(mix, scores, matrix):
    assert found(mix, scores, matrix) is None


CONVOLUTION = {torch.ops.aten.convolution.default}


def test_heads_that_a_convolution_mixes():
    def told(kernel, stride=1):
        return found(lambda q, k, m: F.conv2d((q @ k.mT).softmax(-1), m, stride=stride), (2, 4, 8, 16), (2, 4, 8, 16),
                     (4, 4, *kernel), target=CONVOLUTION) is not None

    assert told((1, 1)) and not told((3, 1)) and not told((1, 1), stride=2)  # several tokens, and every other one


def test_pixels_are_no_heads():
    def mix(v, p, m):
        return F.conv2d((v @ p).unflatten(-1, (2, 8)), m)

    assert found(mix, (2, 4, 16), (2, 16, 16), (4, 4, 1, 1), target=CONVOLUTION) is None
