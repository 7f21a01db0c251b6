"""Random programs of optimizer calls: what must change nothing changes no bit, and what is refused leaves no trace.

Two runs take the same steps. The first, by the kernels, is saved and loaded, copied, pickled, moved in memory and given
what it has to refuse in between; the second, by the reference in PyTorch, only steps. ``QUARTET_FUZZ=N`` runs N.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from unittest import mock

import pytest
import torch
from torch import nn

from quartet import direct, optim
from quartet.kernels.reference.optim.state_format import StateFormat
from quartet.runtime.optim import batches
from quartet.runtime.optim.runners import ReferenceRunner

PROGRAMS, LENGTH = int(os.environ.get("QUARTET_FUZZ", "30")), 10
SHAPES = ((), (1,), (0, 4), (7,), (5, 3), (3, 300), (16, 256), (1, 512), (40, 130), (8, 6, 3, 3), (4, 128, 2, 2))
FORMATS = ("fp32", "bf16", "e4m3", "e5m2", "e4m3/tensor current", "e4m3/64", "e5m2/128", "e4m3/256", "dynamic", "coat")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator():
    return torch.Generator().manual_seed(7)


def by_reference():
    return mock.patch.object(batches, "runner", lambda kind, items, reduce, *_: ReferenceRunner(kind, items, reduce))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def same(left, right):
    assert left.keys() == right.keys()
    for name, a in left.items():
        b = right[name]
        assert a.dtype is b.dtype and a.shape == b.shape, name
        differ = int((~((a == b) | ((a != a) & (b != b)))).sum())
        assert not differ, f"{name}: {differ} of {a.numel()} differ"


# ---- quartet.optim ------------------------------------------------------------------------------------------------


class Run:
    """An optimizer and the gradients that its parameters are given."""

    def __init__(self, make, shapes, dtypes, seed):
        draw = torch.Generator().manual_seed(seed)
        self.make = make
        self.optimizer = make([nn.Parameter((torch.randn(s, generator=draw) * 0.1).to(d))
                               for s, d in zip(shapes, dtypes, strict=True)])

    @property
    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def everything(self):
        found = {}
        for i, p in enumerate(self.params):
            found[f"weight {i}"] = p.detach().clone()
            found |= {f"{key} {i}": x.clone() for key, x in self.optimizer.state.get(p, {}).items()}
        return found

    # What both runs do: each takes the number that the program drew for it.

    def step(self, seed):
        choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)
        for p in self.params:
            grad = (torch.randn(p.shape, generator=draw) * 10 ** choose.uniform(-4, 0)).to(p.dtype)
            p.grad = None if choose.random() < 0.2 else grad if choose.random() < 0.9 else torch.zeros_like(p)
        self.optimizer.step()

    def step_and_step_of_nothing(self, seed):
        self.step(seed)
        self.optimizer.zero_grad(set_to_none=bool(seed % 2))
        self.optimizer.step()

    def rates(self, seed):
        for group in self.optimizer.param_groups:
            group["lr"] = 10 ** random.Random(seed).uniform(-4, -1)

    def another_group(self, seed):
        choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)
        p = nn.Parameter(torch.randn(choose.choice(SHAPES), generator=draw).to(choose.choice(DTYPES)))
        self.optimizer.add_param_group({"params": [p], "lr": 3e-3})

    # What changes nothing.

    def saved_and_loaded(self, seed):
        saved = through_a_file(self.optimizer.state_dict())
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer = self.make(groups)
        self.optimizer.load_state_dict(saved)

    def copied(self, seed):
        self.optimizer = copy.deepcopy(self.optimizer)

    def pickled(self, seed):
        self.optimizer = pickle.loads(pickle.dumps(self.optimizer))

    def moved(self, seed):
        for p in self.params:
            p.data = p.data.clone()
            self.optimizer.state[p] = {k: v.clone() for k, v in self.optimizer.state.get(p, {}).items()}

    # What is refused.

    def refused(self, seed):
        choose = random.Random(seed)
        p = choose.choice(self.params)
        if p.dim() == 0 or not self.optimizer.state.get(p):
            return
        before, data, grad = self.everything(), p.data, p.grad
        if choose.random() < 0.5:
            p.data, error = data.double(), TypeError
        else:
            rows = choose.choice([n for n in (1, 3, data.shape[0] + 1, 64) if n != data.shape[0]])
            p.data, error = torch.zeros((rows, *data.shape[1:]), dtype=data.dtype), ValueError
        stateless = error is ValueError and set(self.optimizer.state[p]) == {"step"}  # SGD without momentum
        p.grad = torch.zeros_like(p)
        if not stateless:
            with pytest.raises(error, match="parameter"):
                self.optimizer.step()
        p.grad = None
        p.data, p.grad = data, grad
        same(self.everything(), before)

    def refused_checkpoint(self, seed):
        saved = copy.deepcopy(self.optimizer.state_dict())
        choices = [(i, k) for i, state in saved["state"].items() for k, x in state.items()
                   if x.dim() and not k.endswith("_scale")]
        if not choices:
            return
        i, key = random.Random(seed).choice(choices)
        x = saved["state"][i][key]
        saved["state"][i][key] = torch.zeros((x.shape[0] + 3, *x.shape[1:]), dtype=x.dtype)
        before = self.everything()
        with pytest.raises(ValueError, match="nothing was loaded"):
            self.optimizer.load_state_dict(saved)
        same(self.everything(), before)


SHARED = ("step", "step", "step", "step_and_step_of_nothing", "rates", "another_group")
NEUTRAL = ("saved_and_loaded", "copied", "pickled", "moved", "refused", "refused_checkpoint")


def options_of(choose):
    """A class and options that go together."""
    name = choose.choice(("AdamW", "Adam", "Lion", "SGD"))
    block = choose.choice((64, 128, 256))
    forms = [f for f in FORMATS if StateFormat.parse(f).block in (None, block)]
    form = (choose.choice(forms), choose.choice(forms)) if name.startswith("Adam") else choose.choice(forms)
    options = {"lr": 1e-2, "state_format": form, "weight_decay": choose.choice((0.0, 0.1)),
               "maximize": choose.random() < 0.2, "min_quantized": choose.choice((0, 64, 4096)),
               **choose.choice(({}, {"master": "fp16"}, {"master": "fp32"}, {"stochastic_rounding": True}))}
    if name == "SGD":
        options |= choose.choice(({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}))
    return name, options


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_program_of_an_optimizer(seed):
    choose = random.Random(seed)
    name, options = options_of(choose)
    shapes = [choose.choice(SHAPES) for _ in range(choose.randint(1, 4))]
    dtypes = [choose.choice(DTYPES) for _ in shapes]

    def make(params):
        return getattr(optim, name)(params, **options, generator=generator())

    ours, reference = (Run(make, shapes, dtypes, seed) for _ in range(2))
    for _ in range(LENGTH):
        number = choose.randrange(1 << 30)
        if choose.random() < 0.5:
            call = choose.choice(SHARED)
            getattr(ours, call)(number)
            with by_reference():
                getattr(reference, call)(number)
        else:
            getattr(ours, choose.choice(NEUTRAL))(number)
    same(ours.everything(), reference.everything())


# ---- quartet.direct -----------------------------------------------------------------------------------------------


INNER = {"torch AdamW": lambda p: torch.optim.AdamW(p, 1e-2), "torch SGD": lambda p: torch.optim.SGD(p, 1e-1, 0.9),
         "AdamW": lambda p: optim.AdamW(p, 1e-2, min_quantized=0), "Lion": lambda p: optim.Lion(p, 1e-2)}


class DirectRun:
    """A model of low-bit weights and its optimizer."""

    def __init__(self, bits, inner, seed, kind, options):
        torch.manual_seed(seed)
        self.model = direct.convert(nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 9)), bits, **kind)
        self.kind, self.inner, self.options = kind, inner, options
        self.optimizer = self.made()

    def made(self):
        return direct.Optimizer(INNER[self.inner](self.model.parameters()), **self.options, generator=generator())

    def everything(self):
        found = {name: x.clone() for name, x in direct.export(self.model).items()}
        for i, p in enumerate(self.model.parameters()):
            found |= {f"{key} {i}": x.clone() for key, x in self.optimizer.state.get(p, {}).items()}
        return found

    def step(self, seed):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_and_loaded(self, seed):
        saved = through_a_file(self.optimizer.state_dict())
        self.optimizer = self.made()
        self.optimizer.load_state_dict(saved)

    def copied(self, seed):
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))

    def pickled(self, seed):
        self.model, self.optimizer = pickle.loads(pickle.dumps((self.model, self.optimizer)))

    def exported(self, seed):
        exported = through_a_file(direct.export(self.model))
        direct.load(self.model, {k: v for k, v in exported.items() if not isinstance(v, direct.LowBitWeight)})
        states = self.optimizer.state_dict()
        self.optimizer = self.made()
        self.optimizer.load_state_dict(states)

    def moved(self, seed):
        for p in self.model.parameters():
            p.data = p.data.clone()

    def doubled(self, seed):
        self.model.double().float()

    def refused(self, seed):
        """A step between forward and backward, and a weight of another shape, then put back."""
        out, before = self.model(torch.ones(2, 24)), self.everything()
        with torch.no_grad():
            self.model[0].weight.copy_(self.model[0].weight.clone())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        self.optimizer.zero_grad()
        weight = self.model[0].weight
        if self.optimizer.state.get(weight):
            data = weight.data
            weight.data = direct.LowBitWeight.of(torch.ones(41, 24), weight.bits, weight.paper, weight.activations)
            weight.grad = torch.zeros(41, 24)
            if any(x.dim() for x in self.optimizer.state[weight].values()):
                with pytest.raises(ValueError, match="41, 24"):
                    self.optimizer.step()
            weight.grad, weight.data = None, data
        same(self.everything(), before)


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_program_of_direct_training(seed):
    choose = random.Random(seed)
    kind = {"paper": choose.random() < 0.3, "activations": choose.choice(("int8", None))}
    options = {"rescale": choose.choice(("radial", "rare", None)), "rescale_every": choose.choice((1, 3)),
               "feedback": choose.random() < 0.3}
    bits, inner = choose.choice(("ternary", 2, 3, 4, 8)), choose.choice(list(INNER))
    ours = DirectRun(bits, inner, seed, kind, options | {"bucket_bytes": choose.choice((0, 1 << 20))})
    reference = DirectRun(bits, inner, seed, kind, options)
    for _ in range(LENGTH):
        number = choose.randrange(1 << 30)
        if choose.random() < 0.5:
            ours.step(number)
            with by_reference():
                reference.step(number)
        else:
            getattr(ours, choose.choice(("saved_and_loaded", "copied", "pickled", "exported", "moved", "doubled",
                                         "refused")))(number)
    same(ours.everything(), reference.everything())
