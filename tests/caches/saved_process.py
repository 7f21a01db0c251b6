"""Compile a tiny model with real Inductor under policies of saved activations; print what the caches did as JSON.

    python saved_process.py RECIPE…     "none" keeps activations exact
"""

import json
import sys
from hashlib import sha256

import torch
from torch._dynamo.utils import counters

from quartet import Policy


def step(recipe):
    """Digest of the gradients of one step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 64, bias=False), torch.randn(96, 64, requires_grad=True)
    policy = Policy(None).on(op="saved", recipe=None if recipe == "none" else recipe)
    torch.compile(lambda x: model(x).sin(), backend="quartet", options={"policy": policy})(x).square().sum().backward()
    return sha256(b"".join(t.grad.numpy().tobytes() for t in (x, model.weight))).hexdigest()


def main(recipes):
    torch.set_num_threads(1)
    found = {}
    for recipe in recipes:
        counters.clear()
        result, aot = step(recipe), counters["aot_autograd"]
        found[recipe] = {"result": result, "aot": (aot["autograd_cache_hit"], aot["autograd_cache_miss"]),
                         "bypass": counters["inductor"]["fxgraph_cache_bypass"] + aot["autograd_cache_bypass"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
