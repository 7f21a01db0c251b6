import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quartet.lowering import ir
from quartet.lowering.targets.chains import accepted

ops, MX = torch.ops.quartet, "e2m1/32 e8m0 ceil nearest"


def test_a_kernel_takes_no_quantiser_of_another_device():
    """Where the weight is not kept, a quantiser has no product as its reader, only what is quantised from it."""
    def two(x, w, y):
        a, b, other = (ops.quantize(t, MX, None, 0)[:2] for t in (x, w, y))
        return ops.scaled_mm(*a, *b, MX, MX, torch.float32), ops.dequantize(*other, MX, torch.float32)

    with FakeTensorMode():
        inputs = [torch.empty(32, 64, device=device) for device in ("cpu", "cpu", "meta")]
    gm = make_fx(two)(*inputs)
    gemms = gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM)
    taken = accepted(gm.graph, gemms, lambda spec, rotation, dtype: True)
    assert [node.args[0].meta["val"].device.type for node in taken] == ["cpu", "cpu"]
