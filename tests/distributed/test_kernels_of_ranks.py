"""Ranks that share layers compute with the same kernels, or all of them say why not."""

from pathlib import Path

import gloo
import pytest

pytestmark = gloo.available


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    return gloo.run(Path(__file__).with_name("kernel_workers.py"), "lacking", tmp_path_factory.mktemp("lacking"))


def test_equal_kernels_are_no_matter(lacking):
    assert [rank["alike"] for rank in lacking] == ["", ""]


def test_other_kernels_are_an_error_on_all_ranks(lacking):
    for number, rank in enumerate(lacking):
        assert f"rank {number} and rank {1 - number} have other kernels" in rank["other"], rank["other"]
        assert "no compiler" in rank["other"] and "quartet doctor" in rank["other"]


def test_a_failure_reaches_all_ranks(lacking):
    assert "rank 1 cannot compile: OSError: no compiler" in lacking[0]["failed"]
    assert "no compiler" in lacking[1]["failed"]


def test_whoever_stays_away_is_named_after_the_limit(lacking):
    assert "rank 1 shares layers with rank 0 and has compiled nothing within 0:00:01" in lacking[0]["away"]


def test_data_parallel_ranks_are_told_and_go_on(lacking):
    assert [rank["data parallel"] for rank in lacking] == ["", ""]
    assert sum(len(rank["data parallel warned"]) for rank in lacking) == 1
