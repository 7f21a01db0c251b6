"""AdamW, Adam, Lion and SGD with states in few bits: arguments of ``torch.optim``, and how they are stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.optim.optimizers import Hyper
from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.runtime.optim.base import LowBitOptimizer, Slot

Format = StateFormat | str
PAIR = ("e4m3", "e5m2")
MIN_QUANTIZED = 4096


class _Averaging(LowBitOptimizer):
    """What decays by two betas."""

    def hyper(self, group: dict[str, Any]) -> Hyper:
        b1, b2 = map(float, group["betas"])
        eps = group["eps"] if "eps" in self.defaults else 0.0
        return Hyper(_rate(group), b1, b2, eps, group["weight_decay"], group["maximize"])

    def check(self, group: dict[str, Any]) -> None:
        _check_common(self, group)
        betas = tuple(group["betas"])
        if len(betas) != 2:
            raise ValueError(f"betas are two numbers from 0 to below 1, not {len(betas)}")
        group["betas"] = tuple(_number(f"the {name} of betas", b) for name, b in zip(("first", "second"), betas,
                                                                                  strict=True))
        for name, beta in zip(("first", "second"), group["betas"], strict=True):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"the {name} of betas must be from 0 to below 1, not {beta}")


class Adam(_Averaging):
    """Adam (arXiv 1412.6980) with its two states in few bits, by default FP8 with one scale a tensor.

    The default is that of arXiv 2409.12517: the first moment in E4M3, the second in E5M2, whose range is that of a
    square. Arithmetic is fp32, of one fused pass over memory for all parameters of a group: Triton kernels on a GPU,
    compiled C++ on a CPU, the same bits on both.

    Args:
        params: parameters or groups of them, float32, bfloat16 or float16; DTensors (FSDP2, tensor parallelism) too.
        lr: a float, or a tensor, which a CUDA graph reads at each replay.
        betas: as in ``torch.optim``; may be tensors of one number, which are read once, here.
        eps: as in ``torch.optim``.
        weight_decay: as in ``torch.optim``; may be a tensor of one number, which is read once, here.
        maximize: as in ``torch.optim``.
        decoupled_weight_decay: of :class:`Adam`: as :class:`AdamW` has it always.
        state_format: for each of ``exp_avg`` and ``exp_avg_sq``, or one for both, a
            :class:`~quartet.optim.StateFormat` or its name: ``"fp32"``, ``"bf16"``, ``"e4m3"``, ``"e5m2"``,
            ``"e4m3/256"``, ``"dynamic"``, ``"coat"``. A group may have its own. Formats with blocks are of
            matrices and more: a one-dimensional parameter, or one whose rows are shorter than half a block, keeps
            fp32 states.
        master: keep master weights of 16-bit parameters: ``"fp16"`` with one power-of-two scale a tensor, as that
            paper does, ``"fp32"``, or None.
        stochastic_rounding: round bfloat16 parameters stochastically, which needs no master weights. The bits follow
            from the optimizer's seed, the step, the parameter's number and the element.
        min_quantized: parameters of fewer elements keep fp32 states.
        generator: draws the seed. Without one it follows from the last ``torch.manual_seed`` and the shapes of all
            parameters, and no generator is touched. Ranks that hold copies of a parameter must have the same seed.
        amsgrad: not possible here.
        foreach: accepted for compatibility, as the next three: the step is fused and capturable always, and never
            differentiable.
        capturable: see there.
        differentiable: see there.
        fused: see there.
    Raises:
        ValueError: an argument out of its range, ``amsgrad`` or ``differentiable``.
        TypeError: a parameter of another dtype.
        SpecError: a format that does not exist.
    """

    algorithm = "adam"
    decoupled = False
    SLOTS = (Slot("exp_avg", True), Slot("exp_avg_sq", False))

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, *,
                 state_format: Format | tuple[Format, Format] = PAIR, master: str | None = None,
                 stochastic_rounding: bool = False, min_quantized: int = MIN_QUANTIZED,
                 generator: torch.Generator | None = None, foreach: bool | None = None, maximize: bool = False,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
                 decoupled_weight_decay: bool = False) -> None:
        options = {"foreach": foreach, "capturable": capturable, "differentiable": differentiable, "fused": fused,
                   "decoupled_weight_decay": decoupled_weight_decay}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
                    "maximize": maximize, **options}
        super().__init__(params, defaults, state_format=state_format, master=master,
                         stochastic_rounding=stochastic_rounding, min_quantized=min_quantized, generator=generator)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if not 0.0 <= group["eps"]:
            raise ValueError(f"eps must be at least 0, not {group['eps']}")
        if group.get("amsgrad"):
            raise ValueError(f"{type(self).__name__} has no amsgrad: its running maximum would be a third state; use "
                             "torch.optim for it, or leave it out")
        if self.decoupled and not group.get("decoupled_weight_decay", True):
            raise ValueError("AdamW's weight decay is always decoupled; use Adam for decoupled_weight_decay=False")


class AdamW(Adam):
    """:class:`Adam` with decoupled weight decay (arXiv 1711.05101), by default 1e-2. Arguments and errors: the same."""

    decoupled = True

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False, *,
                 state_format: Format | tuple[Format, Format] = PAIR, master: str | None = None,
                 stochastic_rounding: bool = False, min_quantized: int = MIN_QUANTIZED,
                 generator: torch.Generator | None = None, foreach: bool | None = None, maximize: bool = False,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, state_format=state_format, master=master,
                         stochastic_rounding=stochastic_rounding, min_quantized=min_quantized, generator=generator,
                         foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable,
                         fused=fused, decoupled_weight_decay=True)


class Lion(_Averaging):
    """Lion (arXiv 2302.06675) with its one state in few bits, by default E4M3 in blocks of 256.

    ``c = β₁·m + (1 − β₁)·g``, ``p = p − lr·(sign(c) + weight_decay·p)``, ``m = β₂·m + (1 − β₂)·g``.

    Args: as :class:`Adam`, with one ``state_format``, that of ``exp_avg``. Errors: the same.
    """

    algorithm = "lion"
    SLOTS = (Slot("exp_avg", True),)

    def __init__(self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0, *, state_format: Format = "e4m3/256", master: str | None = None,
                 stochastic_rounding: bool = False, min_quantized: int = MIN_QUANTIZED,
                 generator: torch.Generator | None = None, maximize: bool = False) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, state_format=state_format, master=master,
                         stochastic_rounding=stochastic_rounding, min_quantized=min_quantized, generator=generator)


class SGD(LowBitOptimizer):
    """SGD with momentum as ``torch.optim.SGD`` defines it, with the momentum in few bits: E4M3 in blocks of 256.

    Args:
        params: parameters or groups of them; all arguments that are not named here are those of :class:`Adam`.
        lr: as in ``torch.optim``.
        momentum: as in ``torch.optim``; without it there is no state but the step.
        dampening: as in ``torch.optim``.
        weight_decay: as in ``torch.optim``.
        nesterov: as in ``torch.optim``.
        maximize: as in ``torch.optim``.
        state_format: of ``momentum_buffer``.
    Raises:
        ValueError: an argument out of its range, or Nesterov momentum without momentum or with dampening.
    """

    algorithm = "sgd"
    decoupled = False
    SLOTS = (Slot("momentum_buffer", True),)

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, state_format: Format = "e4m3/256",
                 master: str | None = None, stochastic_rounding: bool = False, min_quantized: int = MIN_QUANTIZED,
                 generator: torch.Generator | None = None, maximize: bool = False, foreach: bool | None = None,
                 differentiable: bool = False, fused: bool | None = None) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                    "nesterov": nesterov, "maximize": maximize, "foreach": foreach, "differentiable": differentiable,
                    "fused": fused}
        super().__init__(params, defaults, state_format=state_format, master=master,
                         stochastic_rounding=stochastic_rounding, min_quantized=min_quantized, generator=generator)

    def slots(self, group: dict[str, Any]) -> tuple[Slot, ...]:
        return self.SLOTS if group["momentum"] else ()

    def hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(_rate(group), group["momentum"], 1.0 - group["dampening"], 0.0, group["weight_decay"],
                     group["maximize"])

    def check(self, group: dict[str, Any]) -> None:
        _check_common(self, group)
        if not group["momentum"] >= 0.0:
            raise ValueError(f"momentum must be at least 0, not {group['momentum']}")
        if math.isnan(group["dampening"]):
            raise ValueError("dampening must be a number, not nan")
        if group["nesterov"] and (group["momentum"] <= 0.0 or group["dampening"] != 0.0):
            raise ValueError("Nesterov momentum needs a momentum above 0 and no dampening, not "
                             f"{group['momentum']} and {group['dampening']}")


def _rate(group: dict[str, Any]) -> float | Tensor:
    """The learning rate; a tensor of another device than the parameters' as a float."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and group["params"] and lr.device != group["params"][0].device:
        return float(lr)
    return lr


def _number(name: str, value: float | Tensor) -> float:
    """A number, of a tensor of one too."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number, not a tensor of shape {list(value.shape)}")
    return float(value)


def _check_common(optimizer: LowBitOptimizer, group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"a learning rate is one number, not a tensor of shape {list(lr.shape)}")
    elif not 0.0 <= lr:
        raise ValueError(f"lr must be at least 0, not {lr}")
    group["weight_decay"] = _number("weight_decay", group["weight_decay"])
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"weight_decay must be at least 0, not {group['weight_decay']}")
    if group.get("differentiable"):
        raise ValueError(f"{type(optimizer).__name__} has no differentiable step; use torch.optim for it")
