"""What tests through Inductor's real code generation ask for: ``pytestmark = pytest.mark.usefixtures("inductor")``."""

import pytest
import torch
from torch._inductor.utils import fresh_cache

from quartet.lowering.targets import inductor as lowerings


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """The lowerings, and no code from an earlier run."""
    lowerings.register()
    with fresh_cache(dir=str(tmp_path_factory.mktemp("inductor"))):
        yield


@pytest.fixture
def inductor(registered):
    """Nothing of what an earlier test compiled."""
    torch._dynamo.reset()
