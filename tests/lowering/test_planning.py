"""What Inductor's planner of memory believes to be free once codes are decoded."""

import pytest
import torch
from torch._inductor import memory
from torch._inductor.compile_fx import compile_fx_inner
from torch.fx.experimental.proxy_tensor import make_fx

from quartet.kernels.reference.formats.saved import encode_saved
from quartet.lowering.ir.ops.saved import DECODE
from quartet.lowering.targets import inductor


class Planned(Exception):
    """The planner has been asked."""


@pytest.mark.parametrize("element, group, rounds", [("e4m3", 16, None), ("uint8", 64, 0)])
def test_scales_are_as_large_as_they_are(monkeypatch, element, group, rounds):
    seed = None if rounds is None else torch.tensor([rounds])
    codes, scales = encode_saved(torch.randn(32, 256), element, group, seed)
    sizes, theirs = {}, memory.get_freeable_input_buf

    def recorded(*args):
        sizes.update({name: buffer.mpi_buffer.size_free for name, buffer in theirs(*args).items()})
        raise Planned

    def decode(codes, scales):
        return (DECODE(codes, scales, element, group, torch.bfloat16).sin(),)

    inductor.register()
    gm = make_fx(decode, tracing_mode="fake")(codes, scales)
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), ("codes", "scales"), strict=True):
        node.name = node.target = name
    gm.recompile()
    monkeypatch.setattr(memory, "get_freeable_input_buf", recorded)
    fake = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with pytest.raises(Exception) as error, torch._inductor.config.patch(force_disable_caches=True):
        compile_fx_inner(gm, fake)
    assert "Planned" in repr((error.value, error.value.__cause__, error.value.__context__))
    assert sizes == {"codes": codes.nbytes, "scales": scales.nbytes}
