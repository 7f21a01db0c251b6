"""One count of optimizer steps: those who asked are told once of each, and a failure holds up nobody."""

import pytest
import torch

from quartet.runtime import optimizer_steps
from quartet.runtime.optimizer_steps import OptimizerSteps


@pytest.fixture
def steps(monkeypatch):
    """A count of its own, whose hooks end with the test."""
    handles = []
    for name in ("register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"):
        register = getattr(optimizer_steps, name)
        monkeypatch.setattr(optimizer_steps, name, lambda hook, register=register: handles.append(register(hook)))
    found = OptimizerSteps()
    found.watch()
    yield found
    for handle in handles:
        handle.remove()


@pytest.fixture
def told(steps):
    """What happened: ("before" or "after", optimizer), and "end"."""
    seen = []
    steps.before_each(lambda optimizer: seen.append(("before", optimizer)))

    def after(optimizer):
        seen.append(("after", optimizer))
        steps.at_the_end(end)

    def end():
        seen.append("end")

    steps.after_each(after)
    return seen


def parameter():
    made = torch.nn.Parameter(torch.ones(3))
    made.grad = torch.ones(3)
    return made


class Failing(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        raise RuntimeError("no step")


class Outer(torch.optim.SGD):
    """Lets others step inside of its own step; one may fail."""

    inner = ()

    @torch.no_grad()
    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()


def test_each_step_of_each_optimizer_counts(steps, told):
    first, second = torch.optim.SGD([parameter()], 0.1), torch.optim.AdamW([parameter()], 0.1, fused=True)
    before = steps.number
    steps.within["kept"] = 1
    first.step()
    assert not steps.within and steps.number == before + 1
    steps.within["kept"] = 1
    second.step()  # it moves no version counter where its kernel is fused
    assert not steps.within and steps.number == before + 2 and steps.compiled == 0
    assert told == [("before", first), ("after", first), "end", ("before", second), ("after", second), "end"]


def test_a_closure_is_part_of_its_step(steps, told):
    one = parameter()
    for optimizer in (torch.optim.LBFGS([one], max_iter=3), torch.optim.SGD([one], 0.1)):
        told.clear()

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = one.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert told == [("before", optimizer), ("after", optimizer), "end"]


def test_steps_inside_of_a_step_end_with_it(told):
    inner = [torch.optim.SGD([parameter()], 0.1) for _ in range(2)]
    outer = Outer([parameter()], 0.1)
    outer.inner = inner
    outer.step()
    assert [one for one in told if one[0] != "before"] == [("after", one) for one in (*inner, outer)] + ["end"]


def test_a_step_that_fails_counts_for_nothing_and_holds_up_nobody(steps, told):
    good, bad, outer = torch.optim.SGD([parameter()], 0.1), Failing([parameter()], 0.1), Outer([parameter()], 0.1)
    outer.inner = (good, bad)
    before = steps.number
    for optimizer in (bad, outer):
        with pytest.raises(RuntimeError, match="no step"):
            optimizer.step()
    assert steps.number == before + 1 and "end" not in told, "the outer step has not ended"
    assert steps.failed == 1, "between two looks"
    told.clear()
    good.step()
    assert told == [("before", good), ("after", good), "end"]


def test_what_is_kept_does_not_outlive_a_step_that_fails(steps):
    """It may have written parameters before it failed, also what its closure has just kept."""
    class Half(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            if closure is not None:
                closure()
            raise RuntimeError("no step")

    def closure():
        steps.within["within"] = 1

    optimizer = Half([parameter()], 0.1)
    for given in (None, closure):
        steps.within["kept"] = 1
        with pytest.raises(RuntimeError, match="no step"):
            optimizer.step(given)
        assert not steps.within
    assert steps.failed == 2 and steps.number == 0
    good = torch.optim.SGD([parameter()], 0.1)
    good.register_step_post_hook(lambda *_: steps.within["none"])  # the user's own fails, before ours is called
    steps.within["kept"] = 1
    with pytest.raises(KeyError):
        good.step()
    assert not steps.within and steps.failed == 3


def test_a_closure_keeps_what_its_own_step_does_not_end(steps):
    seen = []

    def closure():
        seen.append(dict(steps.within))
        steps.within["kept"] = 1
        return torch.zeros(())

    torch.optim.LBFGS([parameter()], max_iter=2, tolerance_grad=-1).step(closure)
    assert steps.failed == 0 and not steps.within and seen[0] == {}


def stepping_in_backward(count):
    """Parameters that are stepped as soon as they have a gradient."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
    for one in parameters:
        optimizer = torch.optim.SGD([one], 0.1)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        one.register_post_accumulate_grad_hook(step)
    return parameters


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward")


def test_steps_inside_of_a_backward_end_with_it(told):
    first, second = stepping_in_backward(2)
    for _ in range(2):
        told.clear()
        (first.sin() * second).sum().backward()
        assert [one[0] for one in told if one != "end"] == ["before", "after"] * 2
        assert told.count("end") == 1 and told[-1] == "end"


def test_a_backward_that_fails_holds_up_none_that_follows(told):
    first, second = stepping_in_backward(2)
    with pytest.raises(RuntimeError, match="no backward"):
        (Fails.apply(first.sin()) * second).sum().backward()
    assert "end" not in told
    (first.sin() * second).sum().backward()
    assert told.count("end") == 1


def test_a_compiled_step_empties_what_is_kept_and_is_counted(steps, told):
    optimizer = torch.optim.SGD([parameter()], 0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    for count in (1, 2):
        steps.within["kept"] = count
        compiled()
        assert not steps.within and (steps.number, steps.compiled) == (count, count)
    assert not told, "it does not say what it steps"
    optimizer.step()
    assert (steps.number, steps.compiled) == (3, 2)


def test_who_raises_before_prevents_a_step_and_who_raises_after_is_not_alone(steps):
    one, seen = parameter(), []
    optimizer = torch.optim.SGD([one], 0.1)

    def raises(optimizer):
        raise ArithmeticError("told")

    steps.after_each(raises)
    steps.after_each(lambda optimizer: seen.append(optimizer))
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert seen == [optimizer] and steps.number == 1
    steps.before_each(raises)
    moved = one.detach().clone()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert steps.number == 1 and torch.equal(one, moved)
