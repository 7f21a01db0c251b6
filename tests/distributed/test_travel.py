"""Collectives in the graph move codes where the rule allows it, and no number changes."""

from pathlib import Path

import gloo
import pytest


@pytest.fixture(scope="module")
def travelling(tmp_path_factory):
    if not gloo.dist.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    return gloo.run(Path(__file__).with_name("travel_workers.py"), "travelling", tmp_path_factory.mktemp("travel"))


@pytest.mark.parametrize("case", ["sequence parallel quartet", "sequence parallel fp8", "weights quartet",
                                  "experts quartet"])
def test_no_number_changes(travelling, case):
    for rank in travelling:
        assert rank[case] == []


@pytest.mark.parametrize(("case", "operand"), [
    ("sequence parallel quartet", "X"), ("weights quartet", "W"), ("experts quartet", "X")])
def test_codes_travel_and_explain_says_so(travelling, case, operand):
    found, whole = travelling[0][f"{case} moved"], travelling[0][f"{case} whole"]
    assert any(f"fprop: {operand} gathered as codes" in note for note in found["notes"]), found
    assert "torch.uint8" in found["dtypes"] and "torch.uint8" not in whole["dtypes"]
    assert found["collectives"] == whole["collectives"], "none of another kind"


def test_a_scale_of_the_tensor_stays_behind(travelling):
    notes = travelling[0]["sequence parallel fp8 moved"]["notes"]
    assert any("X gathered in high precision: 'e4m3/tensor fp32 amax nearest' is scaled by more" in n for n in notes)
    assert travelling[0]["sequence parallel fp8 moved"]["dtypes"] == ["torch.float32"]
