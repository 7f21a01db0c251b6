"""Custom autograd.Functions that compute their products by hand, as training code has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint


class Linear(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Transposed(Function):
    """A weight ``[in, out]``, both gradients the other way round."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.mm(w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return torch.mm(w, g.t()).t(), torch.mm(g.t(), x).t()


class Megatron(Function):
    """Batches as rows by views of its own, a bias, its own autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(x, w)
        return torch.matmul(x, w.t()) + bias

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, g = g.matmul(w), g.contiguous()
        rows = g.view(-1, g.shape[-1])
        return gx, rows.t().matmul(x.reshape(-1, x.shape[-1])), rows.sum(0)


class Lora(Function):
    """A frozen weight and a product of two; backward multiplies x·aᵀ again and adds to what it has."""

    @staticmethod
    def forward(ctx, x, w, a, b):
        ctx.save_for_backward(x, w, a, b)
        return x @ w.t() + (x @ a.t()) @ b.t() * 2

    @staticmethod
    def backward(ctx, g):
        x, w, a, b = ctx.saved_tensors
        gb = g @ b
        gx = torch.addmm(g @ w, gb, a, alpha=2)
        ga = torch.addmm(torch.zeros_like(a), gb.t(), x, beta=0, alpha=2)
        return gx, None, ga, g.t() @ (x @ a.t()) * 2


class Triple(Function):
    """q, k and v of one x: their wgrads read the same x and are of one shape."""

    @staticmethod
    def forward(ctx, x, q, k, v):
        ctx.save_for_backward(x, q, k, v)
        return x @ q.t(), x @ k.t(), x @ v.t()

    @staticmethod
    def backward(ctx, gq, gk, gv):
        x, q, k, v = ctx.saved_tensors
        gx = gq @ q + gk @ k + gv @ v if ctx.needs_input_grad[0] else None
        return gx, gq.t() @ x, gk.t() @ x, gv.t() @ x


class Recomputed(Function):
    """An MLP that keeps no hidden state."""

    @staticmethod
    def forward(ctx, x, up, down):
        ctx.save_for_backward(x, up, down)
        return torch.relu(x @ up.t()) @ down.t()

    @staticmethod
    def backward(ctx, g):
        x, up, down = ctx.saved_tensors
        hidden = x @ up.t()
        gh = (g @ down) * (hidden > 0)
        return gh @ up, gh.t() @ x, g.t() @ torch.relu(hidden)


class Scaled(Function):
    """Another Function within, also in backward; dgrad scales E, wgrad its result."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return Linear.apply(x, w) * 2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return Linear.apply(g * 2, w.t()), g.t() @ x * 2


class Cast(Function):
    """Operands through FP8, a wgrad in float32 of a model in bfloat16."""

    @staticmethod
    def forward(ctx, x, w):
        x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        ctx.save_for_backward(x, w)
        return x.to(torch.bfloat16) @ w.to(torch.bfloat16).t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(torch.float8_e5m2)
        gw = g.to(torch.float32).t() @ x.to(torch.float32)
        return g.to(torch.bfloat16) @ w.to(torch.bfloat16), gw.to(torch.bfloat16)


class ChunkedLoss(Function):
    """Cross entropy of a head in chunks; forward computes the gradients already."""

    @staticmethod
    def forward(ctx, x, w, labels):
        gx, gw, loss = torch.zeros_like(x), torch.zeros_like(w), x.new_zeros(())
        for start in range(0, len(x), 32):
            part, wanted = x[start:start + 32], labels[start:start + 32]
            logits = part @ w.t()
            loss = loss + F.cross_entropy(logits, wanted, reduction="sum")
            e = (torch.softmax(logits, -1) - F.one_hot(wanted, len(w))) / len(x)
            gx[start:start + 32] = e @ w
            gw += e.t() @ part
        ctx.save_for_backward(gx, gw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, g):
        gx, gw = ctx.saved_tensors
        return gx * g, gw * g, None


class ByHand(nn.Module):
    """A linear layer, a tanh, and a Function of the result and further parameters."""

    def __init__(self, function: type[Function], dtype: torch.dtype = torch.float32, first: bool = False,
                 **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.first, self.names = function, first, tuple(sizes)
        self.inner = nn.Linear(64, 64, dtype=dtype)
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size, dtype=dtype) / 8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.function.apply(x if self.first else torch.tanh(self.inner(x)), *map(self.get_parameter, self.names))
        return out if isinstance(out, Tensor) else out[0] * out[1] + out[2]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        rows = torch.tanh(self.inner(x))
        return chunked_loss(rows, self.head.weight, labels)


def chunked_loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return ChunkedLoss.apply(x, w, labels)


class Shared(ByHand):
    """The same weight twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


class Checkpointed(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: torch.tanh(super(Checkpointed, self).forward(y)), x, use_reentrant=False)


class Autocast(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)
