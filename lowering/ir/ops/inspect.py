"""Ops that look at tensors and change nothing, see ``quartet.runtime.inspect``.

    observe(token, tensors, program)                     statistics, in the steps that are recorded
    check_finite(token, tensors, layer, role, names)     whether each tensor of a product is finite

That they are declared to write to the token keeps them in their order and in the graph. No CUDA graph holds them: it
would not ask whether a step is recorded.
"""

from __future__ import annotations

from quartet.lowering.ir.op import op
from quartet.runtime.inspect import observe as runtime


def _none_fake(*args):
    return None


observe = op(name="observe", fake=_none_fake, mutates=("token",), strides="any", cudagraph_safe=False)(runtime.observe)
check_finite = op(name="check_finite", fake=_none_fake, mutates=("token",), strides="any", cudagraph_safe=False)(
    runtime.check_finite)
OBSERVE, CHECK_FINITE = observe.overload, check_finite.overload
