"""The optimizer kernels compile without a GPU for those we support, keep their data in registers, and read it in wide
words; an element costs few instructions."""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]

import adam_cases as cases  # noqa: E402
import triton  # noqa: E402
import triton_offline  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from quartet.kernels.reference.optim.state_format import StateFormat  # noqa: E402
from quartet.kernels.triton.optim import adam  # noqa: E402
from quartet.kernels.triton.optim import kernels as adam_kernels  # noqa: E402

PAIR = ("e4m3", "e5m2")
KINDS = {
    "pair": cases.adam(PAIR),
    "pair rounded": cases.adam(PAIR, stochastic=True),
    "blocks": cases.adam(("e4m3/256", "e4m3/256")),
    "dynamic": cases.adam(("dynamic", "dynamic")),
    "coat": cases.adam(("coat", "coat")),
    "fp32": cases.adam(("fp32", "fp32")),
    "master": cases.adam(PAIR, master=True),
    "lion": cases.Kind("lion", (StateFormat.parse("e4m3/256"),), (True,)),
}
GPUS = (80, 89, 90, 100, 120)
ALL = "pair rounded"
MOST_INSTRUCTIONS = {"pair": 72, "pair rounded": 84, "blocks": 78}  # of an element, slow paths of / and √ included
BRANCH = re.compile(r"BRA.*?0x([0-9a-f]+)")
WORD = re.compile(r"\b((?:LDG|STG)\.E(?:\.64|\.128)?)")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")


def launches(name, ragged=False):
    """What one step launches, for a GPU that converts FP8 itself and for one that does not."""
    kind = KINDS[name]
    layout = cases.Layout(16, 1000 if ragged else 4 * kind.tile, kind.tile)
    case = cases.Case(kind, (layout,))

    def call():
        params = [cases.made(case, layout, torch.Generator())]
        cases.triton_runner(case, params)([torch.zeros_like(params[0].param)], 1)

    return triton_offline.launches(call)


@cache
def compiled(name, capability, ragged=False):
    """Of each kernel: what it is and how it came out; for other GPUs than Hopper all of them for one name only, and for
    the others the pass over memory."""
    found = {}
    for launch in launches(name, ragged):
        if capability != 90 and name != ALL and (launch.kernel.__name__ != "update" or launch.keywords["MEASURE"]):
            continue
        if "HARDWARE" in launch.keywords:
            launch.keywords["HARDWARE"] = capability >= 89
        label = launch.kernel.__name__ + (" measuring" if launch.keywords.get("MEASURE") else "")
        if label not in found:
            found[label] = launch, triton_offline.compile_for(launch, capability)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_hopper_keeps_all_in_registers(name):
    for label, (_, kernel) in compiled(name, 90).items():
        assert (kernel.stack, kernel.local) == (0, 0), f"{label}: {kernel.registers} registers"


@pytest.mark.parametrize("capability", [gpu for gpu in GPUS if gpu != 90])
@pytest.mark.parametrize("name", [ALL, "blocks", "coat"])
def test_other_gpus_keep_all_in_registers(name, capability):
    for label, (_, kernel) in compiled(name, capability).items():
        assert (kernel.stack, kernel.local) == (0, 0), f"{label}: {kernel.registers} registers"


def test_ragged_rows_compile():
    for label, (_, kernel) in compiled("blocks", 90, ragged=True).items():
        assert (kernel.stack, kernel.local) == (0, 0), label


@pytest.mark.parametrize("capability", GPUS)
def test_every_kernel_is_compiled(capability):
    names = {label.removesuffix(" measuring") for label in compiled(ALL, capability)}
    assert names == {"put16", "prepare", "settle", "update"}
    assert all(hasattr(adam_kernels, name) for name in names)


def test_products_and_sums_are_not_fused():
    for name in KINDS:
        for launch in launches(name):
            assert launch.kernel.__name__ == "put16" or launch.keywords["enable_fp_fusion"] is False


def loop(name):
    """The instructions of the pass over memory, and how many elements a thread takes in one turn."""
    launch, _ = compiled(name, 90)["update"]
    options = {k: v for k, v in launch.keywords.items() if k in triton_offline.OPTIONS}
    binary = triton.compile(triton_offline._source(launch), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([triton_offline.CUOBJDUMP, "-sass", file.name], capture_output=True, text=True).stdout
    lines = [(int(at, 16), code) for at, code in LINE.findall(text)]
    spans = [(at - int(m[1], 16), int(m[1], 16), at) for at, code in lines
             if (m := BRANCH.search(code)) and int(m[1], 16) < at]
    _, first, last = max(spans)
    elements = launch.keywords["R"] * launch.keywords["B"] // (32 * launch.keywords["num_warps"])
    return [code for at, code in lines if first <= at <= last], elements


@pytest.mark.parametrize("name", MOST_INSTRUCTIONS)
def test_an_element_costs_few_instructions(name):
    code, elements = loop(name)
    assert len(code) / elements <= MOST_INSTRUCTIONS[name]


def test_weights_and_codes_move_in_wide_words():
    """Eight elements a thread: 16 bytes of bf16, 8 of codes."""
    code, elements = loop("blocks")
    assert elements == 8
    words = Counter(m[1] for c in code if (m := WORD.search(c)))
    assert words["LDG.E.128"] == 2 and words["LDG.E.64"] == 2
    assert words["STG.E.128"] == 1 and words["STG.E.64"] == 2


def test_the_target_is_asked_whether_it_converts():
    assert adam.hardware(torch.device("cpu")) is False
