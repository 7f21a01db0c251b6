"""A compiler that knows no earlier test; ``pytestmark = pytest.mark.usefixtures("inductor")`` asks for real code."""

import pytest
import torch
from torch._inductor.utils import fresh_cache

from quartet.lowering.targets import inductor as lowerings


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Without the sizes of others: a forward of torch's own, such as ``nn.Sequential``'s, is one code object for all
    models, and the second size that dynamo meets there is symbolic."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """The lowerings, and no code from an earlier run."""
    lowerings.register()
    with fresh_cache(dir=str(tmp_path_factory.mktemp("inductor"))):
        yield


@pytest.fixture
def inductor(registered, fresh_compiler):
    """Nothing of what an earlier test compiled."""
