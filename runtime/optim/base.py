"""What the optimizers share: parameter groups, states, checkpoints, and batches of parameters for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quartet.kernels.reference.optim.optimizers import Hyper, Kind
from quartet.kernels.reference.optim.state_format import FP16_MASTER, FP32, StateFormat
from quartet.kernels.reference.optim.states import scale_shape
from quartet.runtime.optim import batches, fit, states
from quartet.runtime.optim import layout as place
from quartet.runtime.optim.runners import Scaling
from quartet.runtime.optim.seed import philox_seed

MASTERS = {"fp16": FP16_MASTER, "fp32": FP32}
MASTER = "master"
_OURS = ("state_format", "master", "stochastic_rounding", "min_quantized", "seed")


class Slot(NamedTuple):
    """A state: its key in ``state_dict`` and whether it takes both signs."""

    name: str
    signed: bool


class LowBitOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose states are stored in few bits; see :class:`quartet.optim.AdamW`.

    Every parameter's state is made of plain tensors: ``step``, and for each state NAME its codes ``NAME``, shaped like
    the parameter, and its ``NAME_scale`` where the format has scales. They are DTensors where the parameter is one.
    """

    algorithm: str
    SLOTS: tuple[Slot, ...]
    decoupled = True  # weight decay acts on the weights, not through the gradient; a group may say otherwise
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any], *, state_format: Any, master: str | None,
                 stochastic_rounding: bool, min_quantized: int, generator: torch.Generator | None) -> None:
        if master is not None and master not in MASTERS:
            raise ValueError(f"master {master!r} does not exist; use None, 'fp16' or 'fp32'")
        if master is not None and stochastic_rounding:
            raise ValueError("master weights and stochastic rounding of the weights exclude each other; "
                             "leave out master= or stochastic_rounding=True")
        if not min_quantized >= 0:
            raise ValueError(f"min_quantized must be at least 0, not {min_quantized}")
        ours = {"state_format": state_format, "master": master, "stochastic_rounding": stochastic_rounding,
                "min_quantized": min_quantized, "seed": None}
        self._batches: dict[int, tuple[Any, list[batches.Batch]]] = {}
        super().__init__(params, defaults | ours)
        self.defaults["seed"] = philox_seed(self.param_groups, generator)
        for group in self.param_groups:
            if group["seed"] is None:
                group["seed"] = self.defaults["seed"]

    # ---- what a subclass says ------------------------------------------------------------------------------------

    def slots(self, group: dict[str, Any]) -> tuple[Slot, ...]:
        """The states of a group's parameters."""
        return self.SLOTS

    def hyper(self, group: dict[str, Any]) -> Hyper:
        """The numbers of a group."""
        raise NotImplementedError

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options that do not exist here."""

    # ---- groups --------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._accept(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise

    def _accept(self, group: dict[str, Any]) -> None:
        self.check(group)
        group["state_format"] = _formats(group["state_format"], len(self.slots(group)))
        for param in group["params"]:
            fit.refuse_dtype(type(self).__name__, self._called(group, param), param)
            place.dense(place.local(param.detach()))
            for form in map(StateFormat.parse, group["state_format"]):
                if form.block is not None:
                    _same_blocks(group["state_format"])

    def kind(self, group: dict[str, Any], param: Tensor) -> Kind:
        """How the kernels see a parameter."""
        slots = self.slots(group)
        formats = tuple(StateFormat.parse(f) for f in group["state_format"])
        small = param.numel() < group["min_quantized"]
        if small or any(place.declined(param, f) for f in formats):
            formats = (FP32,) * len(slots)
        signed = tuple(slot.signed for slot in slots)
        master = group["master"] is not None and param.dtype is not torch.float32
        if master:
            formats, signed = (*formats, FP32 if small else MASTERS[group["master"]]), (*signed, True)
        return Kind(self.algorithm, formats, signed, master, bool(group.get("nesterov")),
                    bool(group["stochastic_rounding"]) and param.dtype is torch.bfloat16,
                    bool(group["weight_decay"]) and not group.get("decoupled_weight_decay", self.decoupled))

    def names(self, group: dict[str, Any], kind: Kind) -> list[str]:
        """Keys of the states that ``kind.formats`` are of."""
        return [slot.name for slot in self.slots(group)] + [MASTER] * kind.master

    def state_bytes(self) -> int:
        """Bytes of all states on this rank, scales included."""
        return sum(place.local(x).nbytes for state in self.state.values() for x in state.values()
                   if isinstance(x, Tensor))

    def _called(self, group: dict[str, Any], param: Tensor) -> fit.Name:
        return lambda: fit.called(self.param_groups, group, param)

    # ---- a step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. What is refused is refused before anything is written.

        Args:
            closure: evaluates the model again and returns the loss.
        Raises:
            RuntimeError: a sparse gradient.
            TypeError: a parameter that became one of another dtype.
            ValueError: a gradient or a state of another shape or device than its parameter's, or of another format.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        site, prepared = 0, []
        for number, group in enumerate(self.param_groups):
            prepared.append((group, self._prepared(number, group, site)))
            site += len(group["params"])
        for group, ready in prepared:
            self._run(group, ready, scaling)
        return loss

    @torch.no_grad()
    def step_tensors(self, tensors: Sequence[Tensor], group: dict[str, Any]) -> None:
        """One step of tensors that are in no group, for callers whose weights are numbers only while they are stepped.

        Each is stepped by its ``grad`` (one without is left alone) and by its state in ``self.state``, which is made
        where there is none and stays there: take it out with ``self.state.pop(tensor)``. Nothing else of them is kept.

        Args:
            tensors: leaves of a dtype that a group takes.
            group: whose options hold, one of ``param_groups``; its parameters are not stepped.
        Raises:
            RuntimeError: a sparse gradient.
            TypeError, ValueError: as :meth:`step`.
        """
        group = {key: value for key, value in group.items() if key != "param_names"} | {"params": list(tensors)}
        active = [t for t in tensors if t.grad is not None]
        for tensor in active:
            if not self.state[tensor]:
                self._init_state(group, tensor)
        if active:
            self._run(group, self._batched(group, active, 0), (None, None))

    def _prepared(self, number: int, group: dict[str, Any], site: int) -> list[batches.Batch]:
        """The batches of a group's parameters that have a gradient: those of the last step if nothing they hold is new.

        Args:
            number: of the group. site: of its first parameter among all.
        """
        active: list[Tensor] = []
        signature: list[Any] = [(*(group[k] for k in _OURS), bool(group["weight_decay"]), group.get("nesterov"),
                                 group.get("decoupled_weight_decay"))]
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            state = self.state[param]
            if not state:
                self._init_state(group, param)
            active.append(param)
            signature.append(batches.seen(param, grad, state.values()))
        known = self._batches.get(number)
        if known is None or known[0] != signature:
            known = (signature, self._batched(group, active, site))
            self._batches[number] = known
        return known[1]

    def _run(self, group: dict[str, Any], prepared: Sequence[batches.Batch], scaling: tuple[Any, Any]) -> None:
        hyper = self.hyper(group)
        for batch in prepared:
            device = batch.parameters[0].device
            batch.runner.run(hyper, batch.gradients(), group["seed"], Scaling(*(_on(x, device) for x in scaling)))
            torch.autograd.graph.increment_version(batch.parameters)  # the kernels write past autograd

    def _batched(self, group: dict[str, Any], params: Sequence[Tensor], site: int) -> list[batches.Batch]:
        sites = {id(p): site + i for i, p in enumerate(group["params"])}
        for param in params:
            self._check_fit(group, param)
        members = []
        for param in params:
            self._lay_out(group, param)
            kind = self.kind(group, param)
            members.append(batches.Member(param, kind, self.state[param], self.names(group, kind), sites[id(param)]))
        return batches.gathered(members)

    def _check_fit(self, group: dict[str, Any], param: Tensor) -> None:
        """Raise where a parameter's gradient or states are not what its kernel is told that they are."""
        name, owner, shape = self._called(group, param), type(self).__name__, list(param.shape)
        fit.refuse_dtype(owner, name, param)
        fit.refuse_gradient(owner, name, param)
        kind, state = self.kind(group, param), self.state[param]
        tiles = place.layout(param, kind)
        for form, key in zip(kind.formats, self.names(group, kind), strict=True):
            value = state.get(key)
            if value is not None:
                fit.refuse_state(key, value, name, param)
            if not states.native(value, state.get(f"{key}_scale"), form, scale_shape(form, tiles)):
                raise ValueError(f"the state {key!r} of {name()} of shape {shape} is not stored as {form}; options of "
                                 "a group, and the dtype of a parameter with master weights, cannot change after its "
                                 "first step, but load_state_dict of a new optimizer converts its states")
        if MASTER in state and not kind.master:
            raise ValueError(f"{name()} of shape {shape} has master weights from when it was of 16 bits, and is "
                             f"{param.dtype} now; make it 16-bit again, or build a new optimizer")

    def _lay_out(self, group: dict[str, Any], param: Tensor) -> None:
        """Give states the order in memory of a parameter whose memory format was changed after its first step."""
        kind, state = self.kind(group, param), self.state[param]
        for at, key in enumerate(self.names(group, kind)):
            if not states.in_order(param, state[key]):
                state |= states.in_order_of(param, place.layout(param, kind), kind, at, key, state[key],
                                            state.get(f"{key}_scale"))

    # ---- states --------------------------------------------------------------------------------------------------

    def _init_state(self, group: dict[str, Any], param: Tensor) -> None:
        """All-zero states, and master weights equal to the weights."""
        fit.refuse_dtype(type(self).__name__, self._called(group, param), param)
        kind, state = self.kind(group, param), self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for at, name in enumerate(self.names(group, kind)):
            value = param.detach() if kind.master and name == MASTER else None
            state.update(states.made(param, place.layout(param, kind), kind, at, name, value))

    def decoded(self, param: Tensor, name: str) -> Tensor:
        """A state of a parameter as fp32, shaped (and sharded) like the parameter.

        Raises:
            KeyError: there is no such state, or none yet.
        """
        state = self.state.get(param) or {}
        if name not in state:
            raise KeyError(f"this parameter has no state {name!r}; it has {sorted(state) or 'none before a step'}")
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        kind = self.kind(group, param)
        at = self.names(group, kind).index(name)
        return states.decoded(param, place.layout(param, kind), kind, at, state[name], state.get(f"{name}_scale"))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def torch_state_dict(self) -> dict[str, Any]:
        """A state dict that the class of the same name in ``torch.optim`` loads: fp32 states and no options of ours.

        Master weights have no place in it and are left out.
        """
        plain = self.state_dict()
        numbers = {i: p for saved, group in zip(plain["param_groups"], self.param_groups, strict=True)
                   for i, p in zip(saved["params"], group["params"], strict=True)}
        found = {}
        for i, saved in plain["state"].items():
            names = [n for n in saved if n != "step" and n != MASTER and not n.endswith("_scale")]
            found[i] = {"step": saved["step"].clone()} | {n: self.decoded(numbers[i], n) for n in names}
        groups = [{k: v for k, v in group.items() if k not in _OURS} for group in plain["param_groups"]]
        return {"state": found, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of its namesake in ``torch.optim`` returned.

        The bits of our own states are kept; fp32 states are encoded in this optimizer's formats. Options of a group
        that the checkpoint has replace those given here.

        Raises:
            ValueError: no checkpoint, or one of another optimizer, other groups or options than exist here, or a state
                of another shape or sharding than its parameter's. The optimizer is then as it was.
        """
        fit.refuse_checkpoint(type(self).__name__, self.defaults, state_dict)
        wrapped = {i: {k: states.Kept(v) if isinstance(v, Tensor) else v for k, v in saved.items()}
                   for i, saved in state_dict["state"].items()}
        before = self.state, self.param_groups
        super().load_state_dict({**state_dict, "state": wrapped})
        self._batches.clear()
        try:
            self._take_over(before[1])
        except Exception:
            self.state, self.param_groups = before
            raise

    def _take_over(self, earlier: Sequence[dict[str, Any]]) -> None:
        """Make groups and states that were just loaded ours; ``earlier``: the groups of before."""
        adopted = {}
        for group, before in zip(self.param_groups, earlier, strict=True):
            for key in _OURS:
                group.setdefault(key, before[key])
            self._accept(group)
            for param in group["params"]:
                if self.state.get(param):
                    adopted[param] = self._adopted(group, param, {k: v.value if isinstance(v, states.Kept) else v
                                                                  for k, v in self.state[param].items()})
        self.state.update(adopted)

    def _adopted(self, group: dict[str, Any], param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        kind, name = self.kind(group, param), self._called(group, param)
        step = saved.get("step", 1.0)  # torch's SGD counts none
        state: dict[str, Any] = {"step": torch.tensor(float(step), dtype=torch.float32, device=param.device)}
        for at, key in enumerate(self.names(group, kind)):
            value, scale = saved.get(key), saved.get(f"{key}_scale")
            if value is None and key == MASTER:
                value = param.detach()
            tiles, form = place.layout(param, kind), kind.formats[at]
            if value is not None and (problem := fit.unlike(f"the saved state {key!r}", value, name, param)):
                raise ValueError(f"{problem}; nothing was loaded. Load a checkpoint of the same model, or one without "
                                 "this parameter's state")
            if value is not None and states.native(value, scale, form, scale_shape(form, tiles)):
                state |= states.copied(param, tiles, kind, at, key, value, scale)
            elif scale is None and (value is None or value.is_floating_point()):
                state |= states.made(param, tiles, kind, at, key, value)
            else:
                raise ValueError(f"the saved state {key!r} of {name()} are codes of another format, or other blocks, "
                                 f"than {form}; nothing was loaded. Load torch_state_dict() of the optimizer that "
                                 "saved it, which any format takes")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batches = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_batches"}


def _formats(value: Any, count: int) -> tuple[str, ...]:
    """Names of the formats of ``count`` states."""
    several = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(several) != count:
        raise ValueError(f"state_format has {len(several)} entries for {count} states; give one for all, or one each")
    return tuple(str(StateFormat.of(v)) for v in several)


def _same_blocks(formats: Iterable[str]) -> None:
    sizes = {f.block for f in map(StateFormat.parse, formats) if f.block is not None}
    if len(sizes) > 1:
        raise ValueError(f"states in blocks of {' and '.join(map(str, sorted(sizes)))} do not go together; give all "
                         "the same block, or one scale a tensor")


def _on(x: Any, device: torch.device) -> Tensor | None:
    """A GradScaler's number as fp32 on the device."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        return torch.tensor(x, dtype=torch.float32, device=device)
    return x.to(device, torch.float32, non_blocking=True).reshape(())
