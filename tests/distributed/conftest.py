"""``ranks("name")``: run a function of workers.py in two gloo processes and collect what each returns."""

from pathlib import Path

import gloo
import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A function: ``ranks("ddp")`` is the list of ``workers.ddp(rank, folder)``; a failure on a rank raises here."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    workers = Path(__file__).with_name("workers.py")
    return lambda name: gloo.run(workers, name, tmp_path_factory.mktemp(name))
