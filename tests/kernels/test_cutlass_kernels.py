"""Kernels compiled by nvcc: they open, accept the shapes that we send, and have their kind's tensor-core instruction.

Four of them, and with ``QUARTET_TEST_TABLE=1`` (``make test-cutlass``) the whole table and the other epilogues. One
test does all that a kernel has to stand, so that workers compile different ones and each is compiled once.
"""

import itertools
import os
import re

import pytest
from cutlass_tools import census, needs_cutlass

from quartet.kernels.cutlass.build import build
from quartet.kernels.cutlass.configuration import ARCHS, BLOCK, KINDS, Configuration, choose, table
from quartet.kernels.cutlass.library import MISALIGNED, SUCCESS, KernelError, Library, Problem
from quartet.kernels.reference import swizzled_offset, swizzled_size

TRAINING_STEP = (8192, 4096, 4096)
FOUR = [choose(arch, kind, *TRAINING_STEP) for arch in ("sm_100a", "sm_120a") for kind in ("mxf4", "nvf4")]
EPILOGUES = [choose(arch, kind, *TRAINING_STEP, **epilogue) for arch, kind in (("sm_100a", "mxf4"), ("sm_120a", "nvf4"))
             for epilogue in ({"output": "fp16"}, {"output": "fp32"}, {"bias": True}, {"accumulate": True},
                              {"output": "fp32", "bias": True, "accumulate": True})]
WHOLE = [*FOUR, *(c for c in table() if c not in FOUR), *EPILOGUES]

SHARED_MEMORY = {"sm_100a": 227 * 1024, "sm_103a": 227 * 1024, "sm_120a": 99 * 1024, "sm_121a": 99 * 1024}
MS = (1, 2, 16, 17, 127, 128, 200, 2048, 8192, 65536)
NS = (1, 4, 8, 12, 64, 72, 100, 2560, 4097, 11008, 14336, 128256)
KS = (16, 32, 33, 48, 64, 96, 100, 112, 768, 2560, 4096, 11008, 14336)


def problem(m, n, k):
    """Rows padded to whole 16-byte units, whatever the extents, so that only these decide."""
    rows_of_k, rows_of_n = -(-k // 32) * 32, -(-n // 8) * 8
    return Problem(m=m, n=n, k=k, lda=rows_of_k, ldb=rows_of_k, ldc=rows_of_n, ldd=rows_of_n)


def accepts_what_we_say(library, configuration):
    accepted = 0
    for m, n, k in itertools.product(MS, NS, KS):
        ours = configuration.supports(m, n, k) is None
        theirs = library.can_implement(problem(m, n, k)) == SUCCESS
        if configuration.kind == "mxf8" and k % 32:  # CUTLASS takes K in 16s and reads half a scale block
            assert not ours
        else:
            assert ours == theirs, (m, n, k, configuration.supports(m, n, k))
        accepted += ours
    assert 0 < accepted < len(MS) * len(NS) * len(KS)


def refuses_what_is_misaligned(library, configuration):
    good = Problem.contiguous(64, 64, 256)
    assert library.can_implement(good) == SUCCESS
    for field, value in (("lda", 264), ("ldb", 272), ("ldd", 66), ("ldc", 66), ("a", 8), ("b", 8), ("d", 4),
                         ("c", 4), ("a_scales", 1), ("b_scales", 8)):
        bad = Problem.contiguous(64, 64, 256)
        setattr(bad, field, value)
        assert library.can_implement(bad) == MISALIGNED, field
    with pytest.raises(KernelError, match=rf"{configuration.name} reports a misaligned operand .*M = 64.*K = 256"):
        library.check(MISALIGNED, good)


def agrees_on_the_scales(library, configuration):
    block = BLOCK[configuration.kind]
    for rows, k in ((1, 32), (40, 96), (128, 256), (300, 4096), (513, 224)):
        cols = k // block
        for operand in (0, 1):
            assert library.scale_size(operand, rows, k) == swizzled_size(rows, cols)
            for row, col in itertools.product({0, rows // 2, rows - 1}, {0, cols // 2, cols - 1}):
                element = col * block + block - 1
                assert library.scale_offset(operand, rows, k, row, element) == swizzled_offset(row, col, cols)


def fits_the_multiprocessor(library, configuration):
    assert 0 < library.shared_memory() <= SHARED_MEMORY[configuration.arch]
    assert library.stages() >= 2, "loads and products cannot overlap"
    assert library.workspace_size(Problem.contiguous(*TRAINING_STEP)) >= 0


def has_its_instruction(built, configuration):
    found = census(built.path)
    products = {name: count for name, count in found.mnemonics.items() if name.split(".")[0].endswith("MMA")}
    assert len(products) == 1, products
    ((mnemonic, count),) = products.items()
    assert re.fullmatch(configuration.instruction, mnemonic), mnemonic
    assert count >= 4
    assert (found.stack, found.local) == (0, 0)
    assert not [name for name in found.mnemonics if name.split(".")[0] in ("LDL", "STL")]
    assert 0 < found.registers == built.registers <= 255
    assert built.spills == 0


@needs_cutlass
@pytest.mark.parametrize("configuration", WHOLE if os.environ.get("QUARTET_TEST_TABLE") else FOUR, ids=lambda c: c.name)
def test_kernel(configuration):
    built = build(configuration)
    library = Library(configuration, built.path)
    accepts_what_we_say(library, configuration)
    refuses_what_is_misaligned(library, configuration)
    agrees_on_the_scales(library, configuration)
    fits_the_multiprocessor(library, configuration)
    has_its_instruction(built, configuration)


def test_the_four_are_of_the_kinds_and_architectures_they_should_be():
    assert {(c.kind, c.arch) for c in FOUR} == set(itertools.product(("mxf4", "nvf4"), ("sm_100a", "sm_120a")))
    assert {(c.kind, c.arch) for c in WHOLE} == set(itertools.product(KINDS, ARCHS))
    assert {(c.output, c.bias, c.accumulate) for c in WHOLE} >= {("fp32", True, True), ("fp16", False, False)}
    assert all(isinstance(c, Configuration) for c in WHOLE) and len(set(WHOLE)) == len(WHOLE)
