"""Q-Ramping against its definition, element by element in plain Python."""

import copy
import io

import pytest
import torch
from torch import nn

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.optim import AdamW, QRamping
from quartet.runtime.optim.ramping import periods

SPEC = QuantSpec.parse("e2m1/32 e8m0 ceil nearest")
LR = 0.01


def rounded(w):
    return reference.dequantize(*reference.quantize(w, SPEC)[:2], SPEC)


def oscillating(seed=0, rows=4):
    """A weight half of whose elements lie where two codes meet, and gradients that push those to and fro."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, 32, generator=g) * 2 + 1
    weight[:, 0] = 6
    weight[:, 1:16] = 2.5
    side = torch.ones(rows, 32)

    def gradient(number):
        noise = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1000 * seed + number)) * 0.2 + 1
        return torch.where(weight0 == 2.5, side * (-1.0) ** number, 0.3 * side) * noise

    weight0 = weight.clone()
    weight[:, 1:16] += 0.004
    return nn.Parameter(weight), gradient


class Element:
    """One element under SGD."""

    def __init__(self):
        self.period, self.gradients = 1, []

    def step(self, w, gradient):
        self.gradients.append(gradient)
        if len(self.gradients) < self.period:
            return w
        mean = sum(self.gradients) / len(self.gradients)
        self.gradients = []
        return w - LR * mean


@pytest.mark.parametrize("interval", [None, 12])
def test_against_plain_python(interval):
    weight, gradient = oscillating()
    probe, largest = 5, 9
    ours = QRamping(torch.optim.SGD([weight], LR), [weight], probe=probe, interval=interval, largest=largest)
    expected = weight.detach().clone().double()
    elements = [[Element() for _ in range(32)] for _ in range(4)]
    seen = set()
    for number in range(30):
        since = number if interval is None else number % interval
        if since == 0:
            sums = torch.zeros(2, 4, 32, dtype=torch.float64)
        before = weight.detach().clone()
        weight.grad = gradient(number)
        ours.step()
        assert torch.equal(weight.grad, gradient(number)), "the gradient is the user's"
        for i in range(4):
            for j in range(32):
                expected[i, j] = elements[i][j].step(expected[i, j].item(), weight.grad[i, j].item())
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
        if since < probe:
            sums += torch.stack(((weight.detach() - before).abs(), (rounded(weight.detach()) - rounded(before)).abs()))
        if since == probe - 1:
            for i in range(4):
                for j in range(32):
                    ratio = (sums[1, i, j] / sums[0, i, j]).item() if sums[0, i, j] else 0.0
                    elements[i][j].period = min(largest, int(ratio / 16) * 5 + 1)
        found = torch.tensor([[e.period for e in row] for row in elements])
        assert torch.equal(ours.watched[weight].period.long(), found)
        seen |= set(found.flatten().tolist())
    assert len(seen) > 2, "some elements oscillate"


def test_periods():
    moved = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, float("nan")])
    quantized = torch.tensor([0.0, 15.9, 16.0, 40.0, 1e9, 0.0, 2.0, float("nan"), 1.0])
    assert periods(moved, quantized, 16).tolist() == [1, 1, 6, 11, 16, 1, 1, 1, 1]
    assert periods(moved, quantized, 1).tolist() == [1] * 9


def test_moments_of_an_element_are_those_of_its_own_steps():
    weight, gradient = oscillating()
    ours = QRamping(torch.optim.Adam([weight], LR), [weight], probe=1)
    weight.grad = gradient(0)
    ours.step()
    ours.watched[weight].period.fill_(1)
    ours.watched[weight].period[1, 2] = 3
    ours.watched[weight].gathered = torch.zeros(4, 32)
    other = nn.Parameter(weight.detach().clone())
    plain = torch.optim.Adam([other], LR)
    plain.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    held = weight.detach()[1, 2].clone(), ours.optimizer.state[weight]["exp_avg"][1, 2].clone()
    total = 0.0
    for number in range(1, 4):
        weight.grad = gradient(number)
        other.grad = weight.grad.clone()
        total += weight.grad[1, 2]
        if number == 3:
            other.grad[1, 2] = total / 3
            with torch.no_grad():
                other[1, 2] = held[0]
                plain.state[other]["exp_avg"][1, 2] = held[1]
                plain.state[other]["exp_avg_sq"][1, 2] = ours.optimizer.state[weight]["exp_avg_sq"][1, 2]
        ours.step()
        plain.step()
        same = weight.detach() == other.detach()
        if number < 3:
            assert weight.detach()[1, 2] == held[0] and ours.optimizer.state[weight]["exp_avg"][1, 2] == held[1]
            same[1, 2] = True
        assert same.all()


def test_it_stops_an_oscillation():
    def crossings(ramped):
        weight, gradient = oscillating()
        inner = torch.optim.SGD([weight], LR)
        ours = QRamping(inner, [weight], probe=10) if ramped else inner
        changes = 0
        for number in range(60):
            before = rounded(weight.detach())
            weight.grad = gradient(number)
            ours.step()
            changes += int((rounded(weight.detach()) != before).sum()) if number >= 10 else 0
        return changes

    assert crossings(True) < 0.5 * crossings(False)


@pytest.mark.parametrize("at", [3, 8, 13])
def test_a_resumed_run_goes_on_bit_for_bit(at):
    def run(steps, weight, ours, gradient):
        for number in steps:
            weight.grad = gradient(number)
            ours.step()

    def fresh():
        weight, gradient = oscillating()
        return weight, QRamping(torch.optim.AdamW([weight], LR), [weight], probe=5, interval=10), gradient

    weight, ours, gradient = fresh()
    run(range(at), weight, ours, gradient)
    file = io.BytesIO()
    torch.save((weight.detach(), ours.state_dict()), file)
    run(range(at, 25), weight, ours, gradient)
    file.seek(0)
    kept, state = torch.load(file, weights_only=True)
    again, resumed, _ = fresh()
    with torch.no_grad():
        again.copy_(kept)
    resumed.load_state_dict(state)
    run(range(at, 25), again, resumed, gradient)
    assert torch.equal(weight, again)
    assert torch.equal(ours.watched[weight].period, resumed.watched[again].period)
    assert (ours.watched[weight].period > 1).any()


def test_a_model_with_a_closure_and_a_scheduler():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    inner = torch.optim.AdamW(model.parameters(), 1e-2)
    ours = QRamping(inner, model, probe=3, largest=4)
    schedule = torch.optim.lr_scheduler.LinearLR(inner, 1.0, 0.1, 20)
    assert len(ours.watched) == 2 and ours.param_groups is inner.param_groups
    x, y = torch.randn(16, 32), torch.randn(16, 8)

    def closure():
        ours.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(40):
        losses.append(ours.step(closure).item())
        schedule.step()
    assert losses[-1] < 0.5 * losses[0]
    assert inner.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_what_is_not_possible():
    weight, bias = nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(4))
    inner = torch.optim.SGD([weight, bias], LR)
    with pytest.raises(TypeError, match="AdamW cannot; give it an optimizer of torch.optim"):
        QRamping(AdamW([weight]), [weight])
    with pytest.raises(ValueError, match=r"shapes \[\(4,\)\] are not 2-D"):
        QRamping(inner, [bias])
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2\)\]"):
        QRamping(inner, [nn.Parameter(torch.randn(2, 2))])
    with pytest.raises(ValueError, match="no weight to watch"):
        QRamping(inner, nn.Linear(4, 4))
    for wrong in ({"probe": 0}, {"interval": 5}, {"largest": 0}):
        with pytest.raises(ValueError, match="interval at least probe"):
            QRamping(inner, [weight], **wrong)
    with pytest.raises(ValueError, match="to nearest"):
        QRamping(inner, [weight], spec="e2m1/32 e8m0 ceil stochastic")
    with pytest.raises(ValueError, match="lacks 'left', 'optimizer', 'steps', 'weights': it is not of a QRamping"):
        QRamping(inner, [weight]).load_state_dict(inner.state_dict())
    state = QRamping(inner, [weight]).state_dict()
    other = nn.Parameter(torch.randn(8, 32))
    with pytest.raises(ValueError, match="watch the same weights"):
        QRamping(torch.optim.SGD([other], LR), [other]).load_state_dict(state)
