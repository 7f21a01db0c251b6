"""Any torch-style optimizer over weights that exist only as codes: its update, rounded stochastically onto the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from quartet.kernels.reference.optim.lowbit import Draw
from quartet.runtime.direct import rounding
from quartet.runtime.direct.seeds import agree
from quartet.runtime.direct.weight import LowBitWeight
from quartet.runtime.optim import fit
from quartet.runtime.optim.base import LowBitOptimizer
from quartet.runtime.optim.layout import like, local
from quartet.runtime.optim.seed import philox_seed

RESCALES = ("radial", "rare", None)
RESIDUAL = "direct_residual"
SEED, STEP = "direct_seed", "direct_step"
Factory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Optimizer(torch.optim.Optimizer):
    """Steps low-bit weights with the update of another optimizer, and its other parameters as it does.

        optimizer = Optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
        optimizer = Optimizer(quartet.optim.AdamW, model.parameters())

    A step dequantises the weights of a bucket to fp32, lets the inner optimizer step them, and rounds what that added
    stochastically onto the grid; then the numbers are gone. The first and the last are each one pass over memory on a
    GPU. The states of the inner optimizer are its own, keyed by the low-bit parameters. Random bits are Philox's of a
    64-bit seed with counter (element, parameter, step): a resumed run goes on bit for bit, rows of a parameter take the
    same bits however they are sharded. Ranks that train a parameter together (DDP, FSDP2) take the seed of the first of
    them in the first step, which is collective.

    Args:
        optimizer: built on the converted model's parameters, or a function of ``params`` that builds it. Its step may
            look at one parameter at a time only, as all of ``torch.optim`` but LBFGS do. It shares its groups and
            states with this object; step, load and save through this one.
        rescale: how row scales follow the weights. ``"rare"``: every ``rescale_every`` steps a row whose mean
            |code| has drifted by more than √2 gets a new scale and stochastically rounded codes; ``"radial"``: that,
            and in every step the part of the update along the row goes into its scale, where it is exact; None: never.
            Weights under the paper's rule keep their scale.
        feedback: keep what rounding left, 8 bits a weight, and round to nearest (error feedback). Off by default.
        bucket_bytes: fp32 weights that may exist at one time; at least one parameter's do.
        generator: draws the seed; default: it follows from ``torch.manual_seed``'s and the shapes.

    Raises:
        ValueError: options that do not exist, no low-bit parameter, an inner optimizer with master weights, LBFGS.
    """

    inner: torch.optim.Optimizer | None = None

    def __init__(self, optimizer: torch.optim.Optimizer | Factory, params: Iterable[Any] | None = None, *,
                 rescale: str | None = "radial", rescale_every: int = 64, feedback: bool = False,
                 bucket_bytes: int = 256 << 20, generator: torch.Generator | None = None) -> None:
        if rescale not in RESCALES:
            raise ValueError(f"rescale {rescale!r} does not exist; use 'radial', 'rare' or None")
        if not (rescale_every >= 1 and bucket_bytes >= 0):  # NaN is neither
            raise ValueError(f"rescale_every must be at least 1 and bucket_bytes 0, not {rescale_every} and "
                             f"{bucket_bytes}")
        inner = self._built(optimizer, params)
        super().__init__([torch.empty(0, dtype=torch.float32, device="cpu")], {})
        self.rescale, self.rescale_every, self.feedback = rescale, rescale_every, feedback
        self.bucket_bytes = bucket_bytes
        seed = philox_seed(inner.param_groups, generator)
        self._adopt(inner)
        for group in inner.param_groups:
            group.setdefault(SEED, seed)
            group.setdefault(STEP, 0)
        if not any(True for _ in self._low_bit()):
            raise ValueError("none of the optimizer's parameters is low-bit; convert the model before building it")
        self._flips: list[tuple[Tensor, int]] = []
        self._agreed = False

    @staticmethod
    def _built(optimizer: torch.optim.Optimizer | Factory, params: Iterable[Any] | None) -> torch.optim.Optimizer:
        if isinstance(optimizer, torch.optim.Optimizer):
            if params is not None:
                raise ValueError("params= goes with a function that builds the optimizer, not with a built one")
            inner = optimizer
        else:
            if not callable(optimizer):
                raise TypeError("direct.Optimizer takes an optimizer of torch.optim's kind, or a function that builds "
                                f"one of params, not {type(optimizer).__name__}")
            if params is None:
                raise ValueError("give params, for the function that builds the optimizer")
            inner = optimizer(params)
        if isinstance(inner, Optimizer):
            raise ValueError("the optimizer is wrapped already")
        if isinstance(inner, torch.optim.LBFGS):
            raise ValueError("LBFGS looks at all parameters at once; take an optimizer that steps one at a time, such "
                             "as quartet.optim.AdamW")
        if any(group.get("master") is not None for group in inner.param_groups):
            raise ValueError("the optimizer keeps master weights, which low-bit weights do without; leave out master=")
        return inner

    def _adopt(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.inner is None:
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        for key in (SEED, STEP):
            self.param_groups[-1][key] = self.param_groups[0][key]

    # ---- a step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _low_bit(self) -> Iterator[tuple[dict[str, Any], Tensor, int]]:
        """(group, parameter, its number among all) of each low-bit parameter."""
        site = 0
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(local(param), LowBitWeight):
                    yield group, param, site
                site += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; ``closure`` evaluates the model and returns the loss.

        A number that is not finite makes the scale of its row a NaN, so that it shows in the next output. What is
        refused is refused before anything is written.

        Raises:
            RuntimeError: a CUDA graph is being captured.
            ValueError: a gradient, state or weight of another shape than its parameter's.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a step on low-bit weights cannot be captured in a CUDA graph: each replay would round "
                               "by the same random bits; capture forward and backward, and step outside")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self.inner
        assert inner is not None
        for group, param, _ in self._low_bit():
            if param.grad is not None:
                fit.refuse_gradient(type(self).__name__, self._called(group, param), param)
                self._check_fit(group, param)
        if not self._agreed:
            self._agreed = True
            if not any(group[STEP] for group in self.param_groups):  # a checkpoint's are equal already
                agree(self.param_groups, (SEED, "seed"), [param for _, param, _ in self._low_bit()])
        groups, members = self.param_groups, [list(group["params"]) for group in self.param_groups]
        buckets, low = self._buckets(), {id(p) for _, p, _ in self._low_bit()}
        self._flips = []
        try:
            for group, params in zip(groups, members, strict=True):
                group["params"] = [p for p in params if id(p) not in low]
            if any(p.grad is not None for group in groups for p in group["params"]):
                inner.step()
            for group in groups:
                group[STEP] += 1
            for group, bucket in buckets:
                self._step_bucket(inner, group, bucket)
        finally:
            inner.param_groups = groups
            for group, params in zip(groups, members, strict=True):
                group["params"] = params
        return loss

    def _called(self, group: dict[str, Any], param: Tensor) -> fit.Name:
        return lambda: fit.called(self.param_groups, group, param)

    def _check_fit(self, group: dict[str, Any], param: Tensor) -> None:
        """Raise ValueError where a state is of another shape than the parameter."""
        inner, name = self.inner, self._called(group, param)
        for key, x in inner.state.get(param, {}).items() if inner is not None else ():
            if isinstance(x, Tensor) and x.dim() and _elementwise(inner, key):
                fit.refuse_state(key, x, name, param)

    def _buckets(self) -> list[tuple[dict[str, Any], list[tuple[Tensor, int]]]]:
        """Parameters with gradients that are stepped together: of one group, up to ``bucket_bytes``."""
        found: list[tuple[dict[str, Any], list[tuple[Tensor, int]]]] = []
        room = 0
        for group, param, site in self._low_bit():
            if param.grad is None:
                continue
            size = 4 * local(param).numel()
            if not found or found[-1][0] is not group or size > room:
                found.append((group, []))
                room = self.bucket_bytes
            found[-1][1].append((param, site))
            room -= size
        return found

    def _step_bucket(self, inner: torch.optim.Optimizer, group: dict[str, Any],
                     bucket: list[tuple[Tensor, int]]) -> None:
        numbers, residuals = [], []
        for param, _ in bucket:
            weight: Any = local(param)
            number = nn.Parameter(like(param, rounding.numbers(weight), tuple(param.shape)))
            assert param.grad is not None
            number.grad = param.grad.to(torch.float32)
            if param in inner.state:
                inner.state[number] = inner.state.pop(param)
            residuals.append(inner.state[number].pop(RESIDUAL, None) if number in inner.state else None)
            numbers.append(number)
        try:
            if isinstance(inner, LowBitOptimizer):
                inner.step_tensors(numbers, group)
            else:
                group["params"], inner.param_groups = numbers, [group]
                inner.step()
        finally:
            group["params"] = []
            for (param, _), number in zip(bucket, numbers, strict=True):
                if number in inner.state:
                    inner.state[param] = inner.state.pop(number)
        for (param, site), number, residual in zip(bucket, numbers, residuals, strict=True):
            weight = local(param)
            left = None if residual is None else local(residual)
            left = self._round(group, param, weight, local(number.detach()), site, left)
            if left is not None:
                inner.state[param][RESIDUAL] = like(param, left, tuple(param.shape)) if residual is None else residual

    def _round(self, group: dict[str, Any], param: Tensor, weight: LowBitWeight, new: Tensor, site: int,
               residual: Tensor | None) -> Tensor | None:
        """Write the rounded weight; the residual that is left, if one is kept."""
        if not weight.shape[0]:
            return residual
        if self.feedback and residual is None:
            residual = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
        step = group[STEP]
        flips = rounding.absorb(
            weight, new, residual if self.feedback else None, Draw(group[SEED], site, step, _first_row(param)),
            radial_split=self.rescale == "radial",
            rescale=self.rescale is not None and step % self.rescale_every == 0)
        self._flips.append((flips, weight.numel()))
        return residual

    def flipped(self) -> float:
        """Share of the codes that the last step changed, on this rank; it waits for the device."""
        return sum(float(n) for n, _ in self._flips) / max(1, sum(count for _, count in self._flips))

    def state_bytes(self) -> int:
        """Bytes of all states of the inner optimizer on this rank, residuals included."""
        return sum(local(x).nbytes for state in self.state.values() for x in state.values() if isinstance(x, Tensor))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of the inner optimizer; its groups hold the seed and the number of steps, its states the residuals."""
        assert self.inner is not None
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the inner optimizer's own; states keep their saved dtype.

        Raises:
            ValueError: other groups than this optimizer's, or states of other shapes than its parameters'; nothing is
                loaded then.
        """
        inner = self.inner
        assert inner is not None
        before = inner.state, inner.param_groups
        earlier = [(group[SEED], group[STEP]) for group in self.param_groups]
        inner.load_state_dict(state_dict)
        try:
            for group in inner.param_groups:
                for param in group["params"]:
                    self._check_fit(group, param)
        except ValueError:
            inner.state, inner.param_groups = before
            raise
        self._adopt(inner)
        for group, (seed, step) in zip(self.param_groups, earlier, strict=True):
            group.setdefault(SEED, seed)
            group.setdefault(STEP, step)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        ours = isinstance(inner, LowBitOptimizer)
        for _, param, site in self._low_bit():
            for name, value in state_dict["state"].get(numbers[site], {}).items():
                if isinstance(value, Tensor) and value.dim() and (name == RESIDUAL or not ours):
                    self.state[param][name] = value.detach().to(param.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        names = ("inner", "rescale", "rescale_every", "feedback", "bucket_bytes")
        fresh = {"defaults": {}, "state": {}, "param_groups": [], "_flips": [], "_agreed": False}
        return fresh | {k: self.__dict__[k] for k in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt(state["inner"])


def _elementwise(inner: torch.optim.Optimizer | None, key: str) -> bool:
    """Whether a state that is no single number must have the parameter's shape; other people's may be factored."""
    if key == RESIDUAL:
        return True
    if isinstance(inner, LowBitOptimizer):
        return not key.endswith("_scale")
    return type(inner).__module__.startswith("torch.optim.") and not isinstance(inner, torch.optim.Adafactor)


def _first_row(param: Tensor) -> int:
    """Where this rank's rows start in the whole parameter."""
    if not isinstance(param, DTensor):
        return 0
    mesh, first = param.device_mesh, 0
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    rows = param.shape[0]
    for at, placement in enumerate(param.placements):
        if isinstance(placement, Shard):
            rows = -(-rows // mesh.size(at))
            first += coordinate[at] * rows
    return first
