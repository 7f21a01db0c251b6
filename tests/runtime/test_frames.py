"""Where the frames of calls lie, and which of them are of modules."""

import resource
import sys

import pytest
import torch

from quartet.runtime.frames import calls, with_room

CALLS, DEPTHS = 400, 150


def faults(depth):
    """How often the system had to give a page while a loop so deep made some calls."""
    if depth:
        return faults(depth - 1)

    def called():
        pass

    called.__code__ = called.__code__.replace(co_stacksize=200)  # more than what calls itself, so that it meets the end
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        called()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_no_call_is_given_memory_of_its_own():
    assert max(map(faults, range(DEPTHS))) >= CALLS, "somewhere a piece ends, or this test sees nothing"
    assert max(map(with_room(faults), range(DEPTHS))) < CALLS / 10


def test_it_is_the_function():
    @with_room
    def function(a, *, b):
        """What it says."""
        if b is None:
            raise ValueError(a)
        return a, b

    assert function(1, b=2) == (1, 2) and function.__doc__ == "What it says." and function.__name__ == "function"
    with pytest.raises(ValueError, match="3"):
        function(3, b=None)
    with pytest.raises(TypeError):
        function(1, 2)


def test_modules_are_found_through_code_with_constants_that_have_no_hash():
    """As dynamo makes where it goes on after a graph break."""
    found = []

    class Model(torch.nn.Module):
        def forward(self):
            found.extend(calls(sys._getframe())[0])

    def call(model):
        return model()

    call.__code__ = call.__code__.replace(co_consts=(*call.__code__.co_consts, {}))
    model = Model()
    call(model)
    assert found == [model, model]
