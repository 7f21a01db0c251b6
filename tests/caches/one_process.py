"""Compile a tiny model with real Inductor, in several ways, and print what the caches did as JSON.

    python one_process.py NAME…     names of CASES
"""

import json
import logging
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from hashlib import sha256
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

import quartet
from quartet.passes import pipeline

MINE = replace(quartet.recipes()["quartet"], name="mine")


@contextmanager
def two_threads():
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def other_source():
    return patch.object(pipeline, "source_digest", lambda: "a file was edited")


def without_aot_cache():
    return torch._functorch.config.patch(enable_autograd_cache=False)


CASES = {
    "base": ({}, nullcontext),
    "base without AOTAutogradCache": ({}, without_aot_cache),
    "policy": ({"policy": "bf16"}, nullcontext),
    "recipe": ({"policy": quartet.Policy(MINE)}, nullcontext),
    "recipe changed under its name": ({"policy": quartet.Policy(replace(MINE, dgrad=None))}, nullcontext),
    "option": ({"recompute": "gemm"}, nullcontext),
    "disable_kernels": ({"disable_kernels": "cpp"}, nullcontext),
    "source": ({}, other_source),
    "threads": ({}, two_threads),
    "short last batch": ({}, nullcontext),
    "short first batch": ({}, nullcontext),
}
TOKENS = {"short last batch": (64, 20), "short first batch": (20,)}  # of the steps; else one of 32


def train(options, steps):
    """Digest of the output and gradients of the last of some steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    compiled = torch.compile(model, backend="quartet", options=options, dynamic=False)
    for tokens in steps:
        torch.manual_seed(1)
        model.zero_grad()
        x = torch.randn(tokens, 64, requires_grad=True)
        y = compiled(x)
        y.square().sum().backward()
    return sha256(b"".join(t.detach().numpy().tobytes() for t in (y, x.grad, model.weight.grad))).hexdigest()


class Said(logging.Handler):
    """What the log says of a compilation."""

    lines = []

    def emit(self, record):
        if record.levelno == logging.INFO and "compile" in record.msg:
            self.lines.append(record.getMessage())


def main(names):
    torch.set_num_threads(1)
    log = logging.getLogger("quartet")
    log.setLevel(logging.INFO)
    log.addHandler(Said())
    found = {}
    for name in names:
        options, surroundings = CASES[name]
        counters.clear()
        Said.lines.clear()
        with surroundings():
            result = train(options, TOKENS.get(name, (32,)))
        fx, aot = counters["inductor"], counters["aot_autograd"]
        found[name] = {"result": result, "fx": (fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"]),
                       "aot": (aot["autograd_cache_hit"], aot["autograd_cache_miss"]),
                       "bypass": fx["fxgraph_cache_bypass"] + aot["autograd_cache_bypass"],
                       "said": list(Said.lines)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
