"""QuantSpec: its string form, what it refuses and how it says so."""

import itertools

import pytest

from quartet.kernels.spec import (
    BLOCKS,
    ELEMENTS,
    POWERS,
    ROUNDINGS,
    RULES,
    SCALES,
    SIGMAS,
    WHOLES,
    QuantSpec,
    SpecError,
)


def legal():
    fields = itertools.product(ELEMENTS, (*BLOCKS, *WHOLES), SCALES, RULES, ROUNDINGS, SIGMAS, POWERS, (False, True),
                               (False, True))
    for element, block, scale, rule, rounding, sigma, power, mask, tile in fields:
        if rule != "quest" and (sigma, power) != (QuantSpec.sigma, QuantSpec.power):
            continue  # the string names them for quest only
        try:
            yield QuantSpec(element, block, scale, rule, rounding, sigma, power, mask, tile)
        except SpecError:
            continue


def test_every_legal_spec_round_trips():
    specs = list(legal())
    e8m0 = 4 * ((1 + 1 + 2 + 2 + 2 * 6) * 2 + 2 * (2 + 1))  # E2M1 ceil headroom floor even quest; FP8 floor ceil
    nvfp4 = 2 + 2 + 1 + 1  # amax, and of tiles, by both roundings; four_six; eden
    wide = 3 * (2 * (1 + 1 + 4 + 4) + 1)  # FP8 and INT8 of a row, a tensor, blocks, tiles by both rules; delayed
    narrow = 2 * (1 + 4) * 2 + 1  # E2M1 of a row and of blocks, by both roundings; ternary
    assert len(specs) == e8m0 + nvfp4 + wide + narrow
    assert len({str(s) for s in specs}) == len(specs)
    for spec in specs:
        assert QuantSpec.parse(str(spec)) == spec


def test_string_form():
    assert str(QuantSpec(rule="quest", mask=True)) == "e2m1/32 e8m0 quest(guarded,floor) nearest mask"
    assert str(QuantSpec("e4m3")) == "e4m3/32 e8m0 ceil nearest"


def test_properties():
    rules = {element: "absmean" if element == "ternary" else "amax" for element in ELEMENTS if element != "e2m1"}
    of = [QuantSpec.parse(f"{element}/tensor fp32 {rule} nearest") for element, rule in rules.items()]
    assert [spec.bits for spec in (QuantSpec(), *of)] == [4, 8, 8, 8, 8]
    assert [spec.max for spec in (QuantSpec(), *of)] == [6.0, 448.0, 57344.0, 127.0, 1.0]
    assert QuantSpec(rule="headroom").gain == 4 / 3 and QuantSpec(rule="ceil").gain == 1
    assert QuantSpec(rounding="stochastic").stochastic and not QuantSpec().stochastic
    assert hash(QuantSpec()) == hash(QuantSpec())


@pytest.mark.parametrize("fields,message", (
    ({"element": "e3m2"}, "element 'e3m2'.*e2m1, e4m3, e5m2"),
    ({"block": 24}, "24.*16, 32, 64 or 128"),
    ({"scale": "ue5m3"}, "scale 'ue5m3'.*e8m0, e4m3, fp32"),
    ({"scale": "e4m3"}, "'ceil' gives no e4m3 scale; possible: amax, four_six, eden"),
    ({"scale": "e4m3", "rule": "amax"}, "'e4m3' belongs to e2m1 in blocks of 16"),
    ({"tile": True}, "tiles of 32 by 32 with scale 'e8m0' and rule 'ceil' do not exist"),
    ({"block": 16, "scale": "e4m3", "rule": "eden"}, "'eden' rounds its scales stochastically"),
    ({"block": 16, "scale": "e4m3", "rule": "four_six", "rounding": "stochastic"}, "'four_six' chooses by the error"),
    ({"element": "int8"}, "int8 has no 'e8m0' scales"),
    ({"element": "ternary", "scale": "fp32", "rule": "amax"}, "ternary codes and scale rule 'absmean' belong"),
    ({"element": "e4m3", "scale": "fp32", "rule": "delayed"}, "'delayed' gives one scale a tensor, not one a 32"),
    ({"rule": "rceil"}, "rule 'rceil'.*floor, ceil, headroom, quest, even"),
    ({"rounding": "up"}, "rounding 'up'.*nearest, stochastic"),
    ({"rule": "quest", "sigma": "max"}, "sigma 'max'.*centred, guarded, rms"),
    ({"rule": "quest", "power": "ceil"}, "power 'ceil'.*floor, nearest"),
    ({"rule": "quest", "element": "e4m3"}, "'quest'.*e2m1 only, not e4m3"),
    ({"rule": "even", "element": "e5m2"}, "'even'.*e2m1 only, not e5m2"),
    ({"rule": "headroom", "element": "e5m2"}, "'headroom'.*e2m1 only, not e5m2"),
    ({"rule": "ceil", "mask": True}, "'ceil' never clips.*mask=False"),
    ({"rule": "headroom", "mask": True}, "'headroom' never clips"),
    ({"element": "e4m3", "rounding": "stochastic"}, "stochastic.*e2m1 only"),
))
def test_refusals_name_the_field_and_what_is_possible(fields, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(**fields)


@pytest.mark.parametrize("text", ("", "e2m1", "e2m1/32 e8m0 quest(guarded) nearest", "e2m1/32 e8m0 ceil nearest mask1"))
def test_parse_says_the_expected_form(text):
    with pytest.raises(SpecError, match="expected 'element/block scale rule rounding"):
        QuantSpec.parse(text)


def test_parse_refuses_what_the_constructor_refuses():
    with pytest.raises(SpecError, match="'ceil' never clips"):
        QuantSpec.parse("e2m1/32 e8m0 ceil nearest mask")
