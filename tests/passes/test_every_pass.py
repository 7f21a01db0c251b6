"""Each pass of the pipeline has a graph of its own in this folder, and can be watched."""

import re
from pathlib import Path

import pytest
from around import around, linear, matrix

from quartet.passes import pipeline

TESTED = set(re.findall(r'around\("(\w+)"', "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))))


@pytest.mark.parametrize("name", pipeline.NAMES)
def test_each_pass_has_a_test(name):
    assert name in TESTED


def test_no_test_names_a_pass_that_is_none():
    assert set(pipeline.NAMES) >= TESTED


@pytest.mark.parametrize("name", pipeline.OPTIONAL)
def test_what_may_be_left_out_can_be(name):
    change = around(name, linear(), matrix(8, 32), disable_passes=[name])
    assert change.after is None and {record.recipe for record in change.records} == {"quartet"}
