"""Weights that are quantised once an optimizer step, under DDP and FSDP2: as if quantised in every forward."""

from pathlib import Path

import gloo
import pytest
import torch

pytestmark = gloo.available
WORKERS = Path(__file__).with_name("reuse_workers.py")
WEIGHTS, FORWARDS = 4, 3


def same(a, b):
    assert len(a["values"]) == len(b["values"]) > 0
    different = [i for i, (x, y) in enumerate(zip(a["values"], b["values"], strict=True)) if not torch.equal(x, y)]
    assert not different, f"values {different} differ"


def test_ddp_accumulates_what_it_would_with_weights_quantised_each_time(tmp_path):
    for rank in gloo.run(WORKERS, "data_parallel", tmp_path):
        same(rank[True], rank[False])
        every = FORWARDS * WEIGHTS
        assert rank[False]["quantized"] == [every] * 4
        # known to the optimizer after its first step, seen to repeat in the second, once in the third, and in the
        # fourth again when other weights were loaded
        assert rank[True]["quantized"] == [every, 2 * WEIGHTS, WEIGHTS, 2 * WEIGHTS]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return gloo.run(WORKERS, "sharded", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("keep", [False, True], ids=["gathered-each-time", "gathered-once"])
def test_fsdp_accumulates_what_it_would_with_weights_quantised_each_time(sharded, keep):
    for rank in sharded:
        same(rank[keep, True], rank[keep, False])
        assert rank[keep, True]["quantized"] == rank[keep, False]["quantized"] == [FORWARDS * WEIGHTS] * 4
