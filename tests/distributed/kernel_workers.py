"""What one of two gloo processes does where the other lacks a compiler; the test looks at what the ranks return."""

import datetime
import warnings

import torch
from plain_workers import Split

import quartet.backend
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime import agreement
from quartet.runtime.capture import Capture


def lacking(rank, folder):
    """Rank 1 has other kernels, cannot tell, or stays away."""
    ask, found = quartet.backend.kernels_here, {}
    agreement.LIMIT = datetime.timedelta(seconds=300)

    def fails(*arguments):
        raise OSError("no compiler")

    def attempt(name, recipe, answer, same_bits=(0, 1)):
        quartet.backend.kernels_here = answer if rank == 1 else ask
        torch._dynamo.reset()
        options = Options(Policy(recipe), same_bits=same_bits)
        run = torch.compile(Split(rank).shared, backend=lambda gm, inputs: quartet.backend.compile_graph(
            gm, inputs, options, Capture()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run(torch.ones(32, 64))
                found[name] = ""
            except Exception as error:
                found[name] = str(error)
        found[f"{name} warned"] = [str(w.message) for w in caught if "other kernels" in str(w.message)]

    attempt("alike", "quartet", ask)
    attempt("other", "fp8", lambda *arguments: ask(*arguments) + "no compiler")
    attempt("failed", "int8-all", fails)
    attempt("data parallel", "mxfp8", lambda *arguments: ask(*arguments) + "no compiler", None)
    torch.distributed.barrier()
    if rank == 0:
        agreement.LIMIT = datetime.timedelta(seconds=1)
        attempt("away", "nvfp4", ask)
    torch.distributed.barrier()
    return found
