"""The kernels give the bits of the reference: C++ on the CPU, Triton in its interpreter, where one process runs all."""

import sys
from pathlib import Path

import pytest
import torch
from interpreter import differences

sys.path.insert(0, str(Path(__file__).parent))

import adam_cases as cases  # noqa: E402

from quartet.kernels.cpu import optimizer as cpu  # noqa: E402
from quartet.kernels.reference.optim import optimizers as ref  # noqa: E402
from quartet.kernels.reference.philox import philox4x32  # noqa: E402

SCRIPT = Path(__file__).with_name("adam_cases.py")


@pytest.fixture(scope="session")
def interpreted() -> dict[str, list[str]]:
    pytest.importorskip("triton")
    return differences(SCRIPT)


@pytest.mark.parametrize("name", cases.cases())
def test_cpp_equals_the_reference(name):
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    assert not cases.differences(cases.cases()[name], cases.cpu_runner)


@pytest.mark.parametrize("name", cases.cases())
def test_triton_equals_the_reference(name, interpreted):
    assert not interpreted[name], "\n".join(interpreted[name])


CHECKED = cases.Case(cases.adam(("e4m3/256", "e5m2")), (cases.Layout(4, 512, 256),))


def broken(what):
    """The tensors of :data:`CHECKED` with one of another size, dtype, or place in memory."""
    p = cases.made(CHECKED, CHECKED.layouts[0], torch.Generator())
    if what == "weight":
        p.param = p.param[:-1]
    elif what == "codes":
        p.codes[1] = p.codes[1][:-1]
    elif what == "wide codes":
        p.codes[0] = p.codes[0].float()
    elif what == "scales":
        p.scales[0] = p.scales[0][:3]
    elif what == "missing scales":
        p.scales[1] = None
    elif what == "gaps":
        p.codes[0] = p.codes[0].repeat_interleave(2)[::2]
    elif what == "freed":
        p.codes[0].untyped_storage().resize_(0)
    elif what == "tiles":
        p.layout = p.layout._replace(tile=128)
    return p


BROKEN = ("weight", "codes", "wide codes", "scales", "missing scales", "gaps", "freed", "tiles")


@pytest.mark.parametrize("what", BROKEN)
def test_kernels_refuse_what_they_would_leave(what):
    p = broken(what)
    with pytest.raises(ValueError):
        cpu.pointers(CHECKED.kind, p.layout, p.param, p.codes, p.scales, 0, 0)
    pytest.importorskip("triton")
    from quartet.kernels.triton.optim import adam

    entry = adam.Entry(p.param, tuple(p.codes), tuple(p.scales), p.step, p.layout)
    with pytest.raises(ValueError):
        adam.Batch(CHECKED.kind, [entry], CHECKED.gradient)


def test_kernels_refuse_gradients_of_another_size():
    p = broken("nothing")
    table = [cpu.pointers(CHECKED.kind, p.layout, p.param, p.codes, p.scales, 0, 0)]
    for grads in ([torch.zeros(2047)], [torch.zeros(2048)] * 2, []):
        with pytest.raises(ValueError):
            cpu.set_gradients(table, grads)


def test_cpp_does_not_depend_on_the_threads():
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    case = cases.Case(cases.adam(("e4m3", "e5m2"), stochastic=True), (cases.Layout(1, 1 << 18, 256),) * 2, steps=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert not cases.differences(case, cases.cpu_runner)
    finally:
        torch.set_num_threads(before)


def test_random_halves_are_philox_of_seed_group_site_and_step():
    halves = ref.random_halves(cases.SEED, 5, 9, 1 << 33, 16)
    low, high = cases.SEED & 0xFFFFFFFF, cases.SEED >> 32
    for group in range(2):
        words = philox4x32((group, 2, 5, 9), (low, high))
        expected = [w >> s & 0xFFFF for w in words for s in (0, 16)]
        assert halves[8 * group:8 * group + 8].tolist() == expected


def test_rounding_goes_up_as_often_as_the_fraction_says():
    x = torch.full((1 << 16,), 1.0 + 2.0**-7 * 0.3)
    up = ref.round_stochastic(x, torch.arange(1 << 16)) > 1.0
    assert up.float().mean().item() == pytest.approx(0.3, abs=2.0**-15)


def test_rounding_keeps_nan_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    rounded = ref.round_stochastic(x, torch.full((4,), 0xFFFF))
    assert rounded[0].isnan() and rounded[1:].tolist() == [float("inf"), float("-inf"), 0.0]


@pytest.mark.parametrize("base", [0.0, 0.9, 0.95, 0.999])
def test_powers_by_squaring(base):
    for n in (1, 2, 3, 100, 12345):
        assert ref.power(base, n) == pytest.approx(base**n, rel=1e-12, abs=1e-300)


def test_a_spike_saturates_and_the_next_scale_holds_it():
    """One scale a tensor, a step behind: ten times the largest value is cut to twice it, and then representable."""
    case = cases.Case(cases.adam(("e4m3", "e5m2")), (cases.Layout(1, 512, 256),))
    (p,) = [cases.made(case, case.layouts[0], torch.Generator().manual_seed(1))]
    grads = [torch.full((512,), s, dtype=torch.bfloat16) for s in (1.0, 1.0, 100.0, 100.0)]
    sizes = []
    for step, grad in enumerate(grads, 1):
        cases.by_reference(case, [p], [grad], step)
        (m, _) = ref.unpacked(case.kind, p.layout, p.codes, p.scales)
        sizes.append(m.abs().max().item())
    assert sizes[2] == pytest.approx(2 * 0.19, rel=0.07)  # would be 10.2
    assert sizes[3] > 10 * sizes[2]
