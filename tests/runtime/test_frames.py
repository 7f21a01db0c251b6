"""Where the frames of calls lie."""

import resource

import pytest

from quartet.runtime.frames import with_room

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
