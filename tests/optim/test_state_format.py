"""The formats of optimizer states: names, round trips, their errors against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.kernels.reference.optim import states
from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.kernels.reference.optim.states import Layout
from quartet.kernels.spec import SpecError

BLOCKED = ("e4m3/256", "e5m2/64", "dynamic", "coat")
ALL = ("fp32", "bf16", "fp16", "e4m3", "e5m2", "e4m3/tensor current", *BLOCKED)
ERRORS = {"e4m3/256": 2**-4, "e5m2/64": 2**-3, "dynamic": 0.5, "coat": 2**-4 / 0.45, "e4m3": 2**-4, "e5m2": 2**-3,
          "bf16": 2**-8, "fp16": 2**-11, "fp32": 0.0, "e4m3/tensor current": 2**-4}


def round_trip(x, form, signed=True):
    scale = None
    if form.per_tensor:
        scale = states.tensor_scale(x.abs().max(), form)
    codes, scales = states.encode(x, form, signed, scale)
    return states.decode(codes, scales, form, signed)


@pytest.mark.parametrize("name", ALL)
def test_names_are_read_back(name):
    form = StateFormat.parse(name)
    assert StateFormat.parse(str(form)) == form == StateFormat.of(form) == StateFormat.of(name)


@pytest.mark.parametrize("text", ["e3m4", "e4m3/100", "fp32/256", "e4m3/", "dynamic/tensor", "e5m2/128 expanded",
                                  "e4m3/256 current", "e4m3/256 sometimes", "fp16/128"])
def test_what_does_not_exist_is_refused(text):
    with pytest.raises(SpecError, match="possible|expected|use|leave|needs"):
        StateFormat.parse(text)


def test_something_else_is_no_format():
    with pytest.raises(SpecError, match="StateFormat or its name"):
        StateFormat.of(8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("signed", [True, False])
def test_values_come_back_within_the_format(name, signed):
    form, generator = StateFormat.parse(name), torch.Generator().manual_seed(1)
    x = torch.randn(32, form.tile, generator=generator) * 1e-3
    x = x if signed else x.square()
    back = round_trip(x, form, signed)
    large = x.abs() > x.abs().amax(-1, keepdim=True) * 0.01
    relative = ((back - x) / x)[large].abs().max().item()
    assert relative <= ERRORS[name] * (1 + 1e-5)
    assert torch.equal(back.sign()[large], x.sign()[large])


@pytest.mark.parametrize("name", BLOCKED)
def test_encoding_again_changes_no_code(name):
    form, generator = StateFormat.parse(name), torch.Generator().manual_seed(2)
    x = torch.randn(64, form.tile, generator=generator) * 10 ** torch.randn(64, form.tile, generator=generator)
    codes, scale = states.encode(x, form, True)
    again, second = states.encode(states.decode(codes, scale, form, True), form, True)
    if name == "coat":  # the rounded values may span another range, and so have another power
        assert torch.equal(second[:, 0], scale[:, 0])
        ratio = states.decode(again, second, form, True) / states.decode(codes, scale, form, True)
        assert ratio.sub(1).abs().max() < ERRORS["coat"] * 1.5
    else:
        assert torch.equal(again, codes)


@pytest.mark.parametrize("name", BLOCKED)
def test_zeros_and_constants(name):
    form = StateFormat.parse(name)
    assert torch.equal(round_trip(torch.zeros(2, form.tile), form), torch.zeros(2, form.tile))
    constant = torch.full((1, form.tile), -3.0)
    assert torch.allclose(round_trip(constant, form), constant, rtol=0.01)


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_stays_visible(name, bad):
    form = StateFormat.parse(name)
    x = torch.ones(2, form.tile)
    x[0, 5] = bad
    back = round_trip(x, form)
    assert not torch.isfinite(back[0, 5])
    assert torch.allclose(back[1], x[1], rtol=0.01)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_one_scale_a_tensor_keeps_nan_and_saturates(element):
    form = StateFormat(element)
    x = torch.tensor([[float("nan"), 1.0, -1e9]])
    codes, _ = states.encode(x, form, True, torch.tensor(1.0))
    back = states.decode(codes, torch.tensor(1.0), form, True)
    assert back[0, 0].isnan() and back[0, 1] == 1.0 and back[0, 2] == -states.LARGEST[element]


def test_range_expansion_reaches_where_plain_e4m3_does_not():
    x = torch.logspace(-3, -9, 128).reshape(1, 128)
    expanded, plain = (round_trip(x, StateFormat.parse(name)) for name in ("coat", "e4m3/128"))
    assert (expanded > 0).all() and (plain == 0).any()


def test_the_power_of_range_expansion_is_the_formula():
    x = torch.cat([torch.full((1, 64), 2.0**-4), torch.full((1, 64), 2.0**-24)], -1)
    scale = states.encode(x, StateFormat.parse("coat"), True)[1]
    assert scale.tolist() == [[2.0**-4, int(16 * states.EXPANDED_BITS / 20) / 16]]


@given(st.floats(-126, 127, width=32), st.floats(1.0, 1.9375, width=32))
@settings(max_examples=200, deadline=None)
def test_logarithm_and_power_are_close_to_the_true_ones(exponent, significand):
    x = torch.tensor([significand * 2.0 ** int(exponent)], dtype=torch.float32)
    assert abs(states.log2(x).double() - x.double().log2()).item() < 8e-6
    y = torch.tensor([exponent], dtype=torch.float32)
    assert abs(states.exp2(y).double() / y.double().exp2() - 1).item() < 8e-6


def test_powers_of_two_are_exact():
    n = torch.arange(-126, 128, dtype=torch.float32)
    assert torch.equal(states.exp2(n), torch.ldexp(torch.ones(()), n.int()))
    assert torch.equal(states.log2(states.exp2(n)), n)


def test_half_precision_scale_is_a_power_of_two_with_room():
    amax = torch.tensor([1e-9, 0.3, 1.0, 1.5, 7e4])
    scale = states.tensor_scale(amax, StateFormat("fp16"))
    assert torch.equal(torch.frexp(scale)[0], torch.full((5,), 0.5))
    assert ((amax / scale > 2**13) & (amax / scale <= 2**14)).all()


def test_layouts_split_and_join():
    tiles, x = Layout(5, 300, 256), torch.arange(1500.0)
    parts = tiles.split(x)
    assert parts.shape == (10, 256) and parts[1, 44:].abs().sum() == 0
    assert torch.equal(tiles.join(parts), x)


@pytest.mark.parametrize(("name", "ratio"), [("e4m3", 0.25), ("e4m3/256", 0.27), ("dynamic", 0.27), ("coat", 0.27)])
def test_states_take_at_most_27_percent_of_fp32(name, ratio):
    assert StateFormat.parse(name).bytes_per_element / 4 <= ratio
