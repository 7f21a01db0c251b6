"""``quartet selftest`` where there is no GPU: its table, its status, and that its checks can find something."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quartet.cli import main as cli
from quartet.cli.selftest import run as st
from quartet.kernels import reference
from quartet.recipes import recipes
from quartet.runtime.devices import Target

CPU = torch.device("cpu")
RIGHT = st.Check("quantise", "33×80", lambda: (True, "0 of 99 bytes differ"))
WRONG = st.Check("cutlass", "1×48×96", lambda: (False, "1.4e+00"))
ABSENT = st.Check("dot-scaled", "-", lambda: pytest.fail("was run"), "needs compute capability 10.0")


def explodes():
    raise RuntimeError("CUDA error: misaligned address\nand more")


BROKEN = st.Check("triton-fp8", "300×144×4096", explodes)
INTERPRETED = """
import torch
from quartet.cli.selftest import run as st
from quartet.kernels.triton.quantize import ops, rotations
checks = list(st.quantizer_checks(torch.device("cpu"), ((5, 40),), (64, 64)))
rows, healthy = st.outcomes(checks)
assert healthy and len(rows) == 21, rows
some = [c for c in checks[:-1] if not any(part in c.kernel for part in ("swizzled", "fold", "NVFP4"))]
whole, turn = ops.Chain, rotations.mask_rotate
ops.Chain = lambda spec, n, signs, *draw: whole(spec, n, None, *draw)  # as if kernels read no signs
rotations.mask_rotate = lambda x, mask, **how: turn(x, None, **how)  # nor masks
rows, _ = st.outcomes(some)
assert {name for name, _, result, _ in rows if result == "right"} == {
    "quantise, row-major, nearest with mask", "requantise, row-major, nearest with mask", "inverse rotation, nearest"}
ops.Chain = whole
st.RESOLUTION["integers"] = -0.1  # as if every probability were a tenth off
rows, healthy = st.outcomes(checks[-1:])
assert not healthy and rows[0][2] == "WRONG", rows
print("right")
"""


PROVIDERS = """
import torch
from quartet.cli.selftest import run as st
from quartet.cli.selftest.ops import examples
from quartet.lowering.ir.ops import fused
cpu, seen = torch.device("cpu"), set()
for op, arguments in examples(cpu, [(5, 64)]):
    if op.name in ("fp8_cast", "fp8_cast_rows"):  # the interpreter rounds its own way
        continue
    for provider in op.providers[:-1]:
        verdict = st._provided(op, provider, arguments)
        assert verdict[0], (op, provider.name, verdict)
        seen.add(f"{op.name}.{provider.name}")
print(len(seen), sorted(seen))
"""


def test_providers_give_the_bits_of_the_reference():
    """Those of all devices, the Triton ones in its interpreter."""
    done = subprocess.run([sys.executable, "-c", PROVIDERS], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 19, done.stdout


def test_the_table():
    text, healthy = st.selftest([CPU], lambda device: [RIGHT, ABSENT])
    assert healthy and text.splitlines() == [
        "cpu (cpu)",
        "  kernel      shape  result    worst error",
        "  quantise    33×80  right     0 of 99 bytes differ",
        "  dot-scaled  -      not here  needs compute capability 10.0"]


@pytest.mark.parametrize("checks, row", [
    ([RIGHT, WRONG], ("cutlass", "1×48×96", "WRONG", "1.4e+00")),
    ([BROKEN, RIGHT], ("triton-fp8", "300×144×4096", "FAILED", "RuntimeError: CUDA error: misaligned address")),
    ([ABSENT], ("dot-scaled", "-", "not here", "needs compute capability 10.0")),
])
def test_what_is_wrong_or_nothing_at_all_is_not_healthy(checks, row):
    rows, healthy = st.outcomes(checks)
    assert row in rows and len(rows) == len(checks) and not healthy


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["selftest"]) == 2
    said = capsys.readouterr()
    assert not said.out and "compares the kernels of a GPU with the reference, but no CUDA device is here" in said.err


@pytest.mark.parametrize("check, status", [(RIGHT, 0), (WRONG, 1)])
def test_the_status_of_the_command(monkeypatch, capsys, check, status):
    monkeypatch.setattr("quartet.runtime.devices.absent", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(st, "checks_of", lambda device: [check])
    assert cli.main(["selftest"]) == status
    captured = capsys.readouterr()
    said = captured.out
    assert "cuda:0 (GPU 0)" in said and "cuda:1 (GPU 1)" in said and said.count(check.kernel) == 2
    assert captured.err.startswith("quartet: compiling kernels and comparing them with the reference")


def test_a_fair_rounding_is_told_from_a_biased_one():
    exact = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 12 - 6
    draws = torch.randint(0, 512, exact.shape, generator=torch.Generator().manual_seed(1))

    def judged(random):
        return st.unfairness(reference.e2m1_decode(reference.e2m1_encode(exact, random)), exact, 2.0**-10)

    assert judged(draws)[0] < st.SIGMAS and judged(draws)[1] == 0
    assert judged((draws + 8).clamp(max=511))[0] > st.SIGMAS  # 1.6 % too often upwards
    nearest = judged(None)  # fair over all numbers, and to none of them
    assert nearest[0] > st.SIGMAS and nearest[1] == 0
    strange = st.unfairness(torch.tensor([0.5, 3.0]), torch.tensor([0.3, 1.2]), 0.0)
    assert strange[1] == 1


def test_mxfp4_is_quantised_as_by_the_default_recipe():
    forward = recipes()["quartet"].fprop
    assert {p.a for p in st.PRODUCTS if p.format == "MXFP4"} == {forward.a.spec} == {st.FORWARD.spec}
    assert {p.rotation for p in st.PRODUCTS if p.format == "MXFP4"} == {forward.rotation.n}


def test_products_come_in_the_order_of_the_registry():
    checks = list(st.product_checks(Target("cuda", "sm_90"), CPU))
    assert list(dict.fromkeys(check.kernel for check in checks)) == [product.name for product in st.PRODUCTS]
    declined = {check.kernel: check.declined for check in checks}
    for name in ("cutlass, MXFP4", "cutlass, NVFP4", "cutlass, MXFP8", "scaled-mm, NVFP4"):
        assert "compute capability" in declined[name]
    assert declined["triton-fp8, MXFP4"] is declined["cublaslt, FP8"] is declined["int-mm, INT8"] is None
    assert sum(check.kernel == "triton-fp8, MXFP4" for check in checks) == len(st.SHAPES)


@pytest.mark.parametrize("factor, right", [(1.0, True), (1.01, False)])
@pytest.mark.parametrize("product", st.PRODUCTS, ids=lambda product: product.name)
def test_products_are_compared_with_the_references(product, factor, right):
    def multiply(a, b):
        return (st.exact(a, b) * factor).bfloat16()

    assert st._product(CPU, 33, 16, 64, replace(product, multiply=multiply))[0] is right


@pytest.mark.parametrize("product", [p for p in st.PRODUCTS if p.kernel in ("cutlass", "scaled-mm", "int-mm")],
                         ids=lambda product: product.name)
@pytest.mark.parametrize("shape", st.SHAPES, ids=str)
def test_operands_are_handed_over_as_the_kernels_read_them(product, shape):
    """Their ops compute on a CPU too, from the same layouts."""
    right, worst = st._product(CPU, *shape, product)
    assert right, worst


def test_bytes_and_shapes_are_compared():
    x = torch.arange(6, dtype=torch.uint8)
    assert st._differing([(x, x)]) == (True, "0 of 6 bytes differ")
    assert st._differing([(x, x.flip(0))]) == (False, "6 of 6 bytes differ")
    assert st._differing([(x, x[1:])]) == (False, "[6] instead of [5]")
    many = torch.zeros(128, dtype=torch.uint8)
    for wrong, right in ((4, True), (5, False)):
        other = many.clone()
        other[:wrong] = 1
        assert st._differing([(other, many)], st.FEW)[0] is right and not st._differing([(other, many)])[0]


@pytest.mark.slow
def test_the_quantisers_pass_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr
