"""Every module of PyTorch's own test database, compiled by the backend and by Inductor alone.

A policy that quantises nothing changes nothing, bit for bit; the quartet policy runs whatever Inductor runs. Its
rule names linear layers: the default leaves alone what is this small or reads the module's own input.
"""

import pytest
import torch
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture
from quartet.runtime.compat import compile_fx

records = []


def quantised(policy):
    return lambda gm, inputs: compile_graph(gm, inputs, Options(policy), Capture(), records.extend)


WAYS = {
    "plain": lambda gm, inputs: compile_fx(gm, inputs, inner_compile=Capture()),
    "bf16": quantised(Policy("bf16")),
    "quartet": quantised(Policy("quartet").on("linear", "quartet")),
}
SAMPLES = {"nn.Linear": 3, "nn.Bilinear": 2, "nn.LSTMCell": 2, "nn.MultiheadAttention": 2}
REFUSED = {"nn.FractionalMaxPool2d", "nn.FractionalMaxPool3d", "nn.KLDivLoss", "nn.CTCLoss"}  # with an error
QUANTISED = {"nn.Linear", "nn.GRUCell", "nn.LSTMCell", "nn.RNN", "nn.GRU", "nn.LSTM", "nn.MultiheadAttention",
             "nn.TransformerEncoderLayer", "nn.TransformerDecoderLayer", "nn.TransformerEncoder",
             "nn.Transformer"}  # not nn.RNNCell: its first sample is one row, for Inductor not a matmul
BROKEN = {"nn.GaussianNLLLoss"}  # by dynamo, into graphs without a tensor operation


class ThreeWays:
    """A backend that compiles each graph once for every way and runs the one that is chosen."""

    def __init__(self):
        self.chosen, self.graphs = "plain", 0

    def __call__(self, gm, inputs):
        self.graphs += 1
        compiled = {}

        def run(*args):
            if self.chosen not in compiled:
                compiled[self.chosen] = WAYS[self.chosen](gm, inputs)
            return compiled[self.chosen](*args)

        return run


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def outcome(function, module, args, kwargs):
    """Outputs and gradients of one seeded step, or the type of the error that it ends with."""
    leaves = [t for t in [*module.parameters(), *tensors((args, kwargs))] if t.requires_grad and t.is_leaf]
    torch.manual_seed(0)
    try:
        outputs = tensors(function(*args, **kwargs))
        loss = sum(out.square().sum() for out in outputs if out.requires_grad)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, torch.Tensor) else []
    except Exception as error:  # noqa: BLE001  whatever Inductor raises, ours has to raise too
        return type(error)
    return [t.detach() for t in (*outputs, *(g for g in grads if g is not None))]


def samples(info):
    cases = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    return [case for case in cases if case.forward_input is not None][: SAMPLES.get(info.name, 1)]


@torch._dynamo.config.patch(allow_rnn=True)
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_module(info):
    lowered = False
    for case in samples(info):
        torch._dynamo.reset()
        torch.manual_seed(0)
        made, given = case.constructor_input, case.forward_input
        module = info.module_cls(*made.args, **made.kwargs).train()
        backend = ThreeWays()
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            module(*given.args, **given.kwargs)
        compiled = torch.compile(module, backend=backend)
        found = {}
        for way in WAYS:
            records.clear()
            backend.chosen = way
            state = {key: value.clone() for key, value in module.state_dict().items()}
            found[way] = outcome(compiled, module, given.args, given.kwargs)
            module.load_state_dict(state)
        lowered |= any(record.lowered for record in records)
        plain, same, ours = found["plain"], found["bf16"], found["quartet"]
        if isinstance(plain, type):
            assert (same, ours) == (plain, plain)
            assert info.name in REFUSED
            continue
        assert backend.graphs or info.name in BROKEN
        assert not isinstance(same, type) and not isinstance(ours, type), found
        assert len(plain) == len(same) == len(ours)
        for a, b, c in zip(plain, same, ours, strict=True):
            assert torch.equal(a, b) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), "bf16 changed a bit"
            assert c.shape == a.shape and c.dtype == a.dtype
            assert torch.isfinite(c).all() or not torch.isfinite(a).all()
    assert lowered == (info.name in QUANTISED)
