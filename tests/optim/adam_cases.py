"""Steps of many kinds, run by a kernel and by the reference; as a program: by Triton's interpreter on CPU tensors.

``TRITON_INTERPRET=1 python adam_cases.py`` prints a JSON line for each case, with how it differs from the reference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quartet.kernels.reference.optim import optimizers as ref
from quartet.kernels.reference.optim.optimizers import Hyper, Kind
from quartet.kernels.reference.optim.state_format import FP16_MASTER, StateFormat
from quartet.kernels.reference.optim.states import Layout, code_dtype, scale_shape, zero_code

SEED = (1 << 62) + 987_654_321
FORMATS = (("fp32", "fp32"), ("bf16", "bf16"), ("e4m3", "e5m2"), ("e4m3/tensor current", "e5m2"),
           ("e4m3/256", "e4m3/256"), ("e5m2/256", "e5m2/256"), ("dynamic", "dynamic"), ("coat", "coat"),
           ("bf16", "e5m2/128"))
WHOLE, RAGGED = (Layout(1, 2560, 256), Layout(2, 512, 256)), (Layout(3, 300, 256), Layout(1, 77, 256))


@dataclass
class Parameter:
    """A parameter and its states."""

    layout: Layout
    param: Tensor
    codes: list[Tensor]
    scales: list[Tensor | None]
    step: Tensor = field(default_factory=lambda: torch.zeros(()))

    def clone(self) -> Parameter:
        return Parameter(self.layout, self.param.clone(), [c.clone() for c in self.codes],
                         [None if s is None else s.clone() for s in self.scales], self.step.clone())

    def tensors(self) -> list[Tensor]:
        return [self.param, *self.codes, *(s for s in self.scales if s is not None)]


@dataclass(frozen=True)
class Case:
    kind: Kind
    layouts: tuple[Layout, ...] = WHOLE
    dtype: torch.dtype = torch.bfloat16
    gradient: torch.dtype = torch.bfloat16
    hyper: Hyper = Hyper(1e-3, weight_decay=0.01)
    grad_scale: float = 1.0
    steps: int = 2
    device: str = "cpu"
    default: torch.dtype = torch.float32  # of the process, while the kernels' tables are made


def adam(formats: Sequence[str], **more) -> Kind:
    forms = tuple(map(StateFormat.parse, formats))
    signed = (True, False)
    if more.get("master"):
        forms, signed = (*forms, FP16_MASTER), (*signed, True)
    return Kind("adam", forms, signed, **more)


def layouts_of(kind: Kind, whole: bool) -> tuple[Layout, ...]:
    return tuple(x._replace(tile=kind.tile) for x in (WHOLE if whole else RAGGED))


def cases() -> dict[str, Case]:
    found = {}
    for formats in FORMATS:
        name = " ".join(dict.fromkeys(formats))
        kind = adam(formats)
        found[f"adam {name}"] = Case(kind, layouts_of(kind, True))
        rounded = adam(formats, stochastic=True)
        found[f"adam {name} rounded ragged"] = Case(rounded, layouts_of(kind, False), gradient=torch.float32)
    for dtype in (torch.float32, torch.float16):
        found[f"adam {dtype}"] = Case(adam(("e4m3/256", "dynamic")), WHOLE, dtype, dtype)
    found["rounded whole"] = Case(adam(("e4m3", "e5m2"), stochastic=True))
    found["default dtype"] = Case(adam(("fp32", "fp32")), default=torch.bfloat16)
    found["master"] = Case(adam(("e4m3", "e5m2"), master=True))
    found["l2 and scaled"] = Case(adam(("fp32", "fp32"), share=True), grad_scale=1024.0,
                                   hyper=Hyper(1e-3, weight_decay=0.1, maximize=True))
    other = Hyper(torch.tensor(1e-3), 0.9, 0.95, weight_decay=0.1)
    block = (StateFormat.parse("e4m3/256"),)
    found["lion"] = Case(Kind("lion", block, (True,)), hyper=other)
    found["sgd"] = Case(Kind("sgd", block, (True,)), hyper=other)
    found["sgd nesterov"] = Case(Kind("sgd", block, (True,), nesterov=True, share=True), hyper=other)
    found["sgd without momentum"] = Case(Kind("sgd", (), ()), hyper=other)
    return found


def made(case: Case, layout: Layout, generator: torch.Generator) -> Parameter:
    n, kind = layout.rows * layout.width, case.kind
    param = (torch.randn(n, generator=generator) * 0.02).to(case.dtype)
    codes = [torch.full((n,), zero_code(f, s), dtype=code_dtype(f))
             for f, s in zip(kind.formats, kind.signed, strict=True)]
    shapes = [scale_shape(f, layout) for f in kind.formats]
    scales = [None if shape is None else torch.zeros(shape) for shape in shapes]
    if kind.master:
        scales[-1][1] = param.float().abs().max()
        scales[-1][0] = ref.next_scale(scales[-1], kind.formats[-1])
        ref.store(kind, layout, len(codes) - 1, layout.split(param), codes[-1], scales[-1])
    return Parameter(layout, param, codes, scales)


def gradient(case: Case, layout: Layout, generator: torch.Generator) -> Tensor:
    """Of many sizes; the first tile's are zero."""
    n = layout.rows * layout.width
    g = torch.randn(n, generator=generator) * 10 ** (torch.randn(n, generator=generator) - 3)
    g[:layout.tile // 2] = 0.0
    return (g * case.grad_scale).to(case.gradient)


Runner = Callable[[Case, list[Parameter], list[Tensor], int], None]


def by_reference(case: Case, params: list[Parameter], grads: list[Tensor], step: int) -> None:
    """Step ``step`` of all parameters."""
    numbers = ref.coefficients(case.kind, case.hyper, step, case.grad_scale)
    c = torch.tensor(numbers, dtype=torch.float64).float().tolist()
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if case.kind.per_tensor:
            ref.measure(case.kind, p.layout, c, p.param, g, p.codes, p.scales)
        ref.update(case.kind, p.layout, c, p.param, g, p.codes, p.scales, (SEED, i, step, 7 * i))


def differences(case: Case, make_runner: Callable[[Case, list[Parameter]], Callable[[list[Tensor], int], None]],
                device: str = "cpu") -> list[str]:
    """How the tensors after some steps of a kernel differ from those of the reference."""
    generator = torch.Generator().manual_seed(11)
    expected = [made(case, layout, generator) for layout in case.layouts]
    mine = [p.clone() for p in expected]
    for p in mine:
        p.param, p.step = p.param.to(device), p.step.to(device)
        p.codes, p.scales = [c.to(device) for c in p.codes], [None if s is None else s.to(device) for s in p.scales]
    torch.set_default_dtype(case.default)
    try:
        run, found = make_runner(case, mine), []
    finally:
        torch.set_default_dtype(torch.float32)
    for step in range(1, case.steps + 1):
        grads = [gradient(case, p.layout, generator) for p in expected]
        run([g.to(device) for g in grads], step)
        by_reference(case, expected, grads, step)
        for i, (p, q) in enumerate(zip(mine, expected, strict=True)):
            for j, (a, b) in enumerate(zip(p.tensors(), q.tensors(), strict=True)):
                off = int((a.cpu() != b).sum())
                if off:
                    found.append(f"step {step}, parameter {i}, tensor {j}: {off} of {b.numel()} elements differ")
    return found


def triton_runner(case: Case, params: list[Parameter]) -> Callable[[list[Tensor], int], None]:
    from quartet.kernels.triton.optim import adam as kernels

    entries = [kernels.Entry(p.param, tuple(p.codes), tuple(p.scales), p.step, p.layout, i, 7 * i)
               for i, p in enumerate(params)]
    batch = kernels.Batch(case.kind, entries, case.gradient)
    device = params[0].param.device
    scale = None if case.grad_scale == 1.0 else torch.tensor(case.grad_scale, device=device)
    hyper = case.hyper
    if isinstance(hyper.lr, Tensor):
        hyper = Hyper(**{**vars(hyper), "lr": hyper.lr.to(device)})

    def run(grads: list[Tensor], step: int) -> None:
        batch.set_gradients(grads)
        batch.prepare(hyper, scale, None)
        if case.kind.per_tensor:
            batch.measure()
            batch.settle()
        batch.update(SEED)

    return run


def cpu_runner(case: Case, params: list[Parameter]) -> Callable[[list[Tensor], int], None]:
    from quartet.kernels.cpu import optimizer as kernels

    table = [kernels.pointers(case.kind, p.layout, p.param, p.codes, p.scales, i, 7 * i) for i, p in enumerate(params)]

    def run(grads: list[Tensor], step: int) -> None:
        kernels.set_gradients(table, grads)
        numbers = [(*ref.coefficients(case.kind, case.hyper, step, case.grad_scale), float(step))] * len(table)
        for measure in (True, False) if case.kind.per_tensor else (False,):
            kernels.run(case.kind, table, numbers, case.dtype, case.gradient, SEED, measure=measure)

    return run


if __name__ == "__main__":
    import triton

    from quartet.kernels.triton.optim import adam as module

    if not triton.knobs.runtime.interpret:
        sys.exit("these cases run in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python")
    torch.set_num_threads(1)
    module.LOOPS = 2  # the interpreter takes a millisecond an operation
    for name, case in cases().items():
        print(json.dumps({"case": name, "differences": differences(case, triton_runner)}), flush=True)
