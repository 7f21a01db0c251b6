"""The table of CUTLASS kernels: rendering, the rule that chooses, the sizes, and what a wrong call is told."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quartet.kernels.cutlass.configuration import (
    ARCH_OF_CAPABILITY,
    ARCHS,
    KINDS,
    MULTIPROCESSORS,
    OUTPUTS,
    TABLE,
    Configuration,
    ConfigurationError,
    arch_of,
    choose,
    supports,
    table,
)
from quartet.kernels.cutlass.gemm import gemm
from quartet.kernels.cutlass.template import render
from quartet.kernels.reference import swizzled_size

EVERY = [configuration for output in OUTPUTS for bias in (False, True) for accumulate in (False, True)
         for configuration in table(output=output, bias=bias, accumulate=accumulate)]
LARGE = Configuration("mxf4", "sm_100a", (256, 256, 256), (2, 1), "2sm")


def test_names_are_unique_and_fit_for_files():
    assert len({c.name for c in EVERY}) == len(EVERY) > 300
    assert all(re.fullmatch(r"\w+", c.name) for c in EVERY)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_renders_what_it_says(arch, kind):
    for configuration in EVERY:
        if (configuration.arch, configuration.kind) == (arch, kind):
            renders(configuration)


def renders(configuration):
    source = render(configuration)
    assert "$" not in source and source == render(replace(configuration))
    m, n, k = configuration.tile
    assert f"using Tile = cute::Shape<cute::Int<{m}>, cute::Int<{n}>, cute::Int<{k}>>;" in source
    assert f'quartet_name() {{ return "{configuration.name}"; }}' in source
    assert ("LinCombPerColBias" in source) == ("p.bias)" in source) == configuration.bias
    assert ("using Source = void;" in source) == (not configuration.accumulate)
    assert ("p.c);" in source) == ("beta = 1.0f" in source) == configuration.accumulate
    assert source.count("{") == source.count("}")


def test_sources_differ():
    assert len({render(c) for c in EVERY}) == len(EVERY)


def test_rendering_does_not_depend_on_the_process():
    code = ("import hashlib; from quartet.kernels.cutlass.configuration import table; "
            "from quartet.kernels.cutlass.template import render; "
            "print(hashlib.sha256(''.join(map(render, table())).encode()).hexdigest())")
    there = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, text=True,
                           capture_output=True, check=True).stdout.strip()
    assert there == hashlib.sha256("".join(map(render, table())).encode()).hexdigest()


def test_every_architecture_and_kind_has_a_kernel_for_every_epilogue():
    for arch in ARCHS:
        for kind in KINDS:
            for output in OUTPUTS:
                for accumulate in (False, True):
                    assert list(table([arch], [kind], output, True, accumulate)), (arch, kind, output, accumulate)


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "mxf6"}, "kind 'mxf6' does not exist; possible: mxf4, nvf4, mxf8"),
    ({"arch": "sm_90a"}, "arch 'sm_90a' does not exist; possible: sm_100a"),
    ({"schedule": "3sm"}, "schedule '3sm' does not exist"),
    ({"output": "e4m3"}, "output 'e4m3' does not exist; possible: bf16"),
    ({"tile": (512, 256, 256)}, "tile 512x256x256_2x1_2sm does not exist for mxf4 on sm_100a.*256x256x256_2x1_2sm"),
    ({"schedule": "2sm-ultra"}, "does not exist for mxf4 on sm_100a"),
    ({"output": "fp32"}, "256x256x256_2x1_2sm does not exist .* with fp32 output; possible: 256x128x256"),
    ({"accumulate": True}, "256x256x256_2x1_2sm does not exist .* with bf16 output, C; possible: 256x128x256"),
    ({"bias": True}, "256x256x256_2x1_2sm does not exist .* with bf16 output, a bias; possible: 256x128x256"),
])
def test_kernels_that_do_not_exist(change, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(LARGE, **change)


def test_kernels_that_spill_are_in_no_table():
    for arch, kind, tile in (("sm_121a", "mxf4", (128, 128, 128)), ("sm_121a", "mxf8", (128, 128, 128)),
                             ("sm_120a", "mxf4", (256, 128, 128))):
        with pytest.raises(ConfigurationError, match=f"does not exist for {kind} on {arch}"):
            Configuration(kind, arch, tile, schedule="pingpong" if arch == "sm_121a" else "cooperative")
    assert {c.schedule for c in table(["sm_121a"], ["nvf4"])} == {"cooperative", "pingpong"}


@pytest.mark.parametrize(("kind", "shape", "output", "reason"), [
    ("mxf4", (8192, 4096, 4096), "bf16", None),
    ("nvf4", (1, 8, 32), "fp16", None),
    ("mxf8", (3, 4, 32), "fp32", None),
    ("nvf4", (128, 128, 48), "bf16", "nvf4 operands .* need K a multiple of 32, not 48; pad it to 64"),
    ("mxf8", (128, 128, 16), "bf16", "mxf8 operands .* need K a multiple of 32, not 16; pad it to 32"),
    ("mxf4", (128, 100, 64), "bf16", "bf16 output .* need N a multiple of 8, not 100; pad it to 104"),
    ("mxf4", (128, 102, 64), "fp32", "fp32 output .* need N a multiple of 4, not 102; pad it to 104"),
    ("mxf4", (0, 128, 64), "bf16", "M = 0 is not an extent"),
    ("mxf4", (1, 2**31, 64), "bf16", "N = 2147483648 is not an extent .* use 1 to 2147483647"),
])
def test_sizes(kind, shape, output, reason):
    said = supports(kind, *shape, output)
    assert said is None if reason is None else re.search(reason, said)
    if reason is not None:
        with pytest.raises(ConfigurationError, match=reason):
            choose("sm_100a", kind, *shape, output=output)


@pytest.mark.parametrize(("arch", "shape", "tile", "schedule"), [
    ("sm_100a", (16, 4096, 4096), (128, 128, 256), "1sm"),
    ("sm_100a", (128, 128256, 4096), (128, 128, 256), "1sm"),
    ("sm_100a", (256, 4096, 4096), (256, 128, 256), "2sm"),
    ("sm_100a", (1024, 4096, 4096), (256, 128, 256), "2sm"),
    ("sm_100a", (8192, 4096, 14336), (256, 256, 256), "2sm"),
    ("sm_100a", (8192, 96, 4096), (256, 128, 256), "2sm"),
    ("sm_100a", (64, 64, 64), (128, 128, 256), "1sm"),
    ("sm_103a", (8192, 4096, 4096), (256, 256, 768), "2sm-ultra"),
    ("sm_103a", (16, 4096, 4096), (128, 128, 768), "1sm-ultra"),
    ("sm_103a", (8192, 4096, 256), (128, 128, 256), "1sm"),
    ("sm_120a", (8192, 4096, 4096), (128, 128, 128), "cooperative"),
    ("sm_121a", (1, 4096, 4096), (128, 128, 128), "cooperative"),
])
def test_the_rule(arch, shape, tile, schedule):
    chosen = choose(arch, "nvf4", *shape)
    assert (chosen.tile, chosen.schedule) == (tile, schedule)


def test_the_rule_follows_the_device():
    assert choose("sm_100a", "mxf4", 1024, 4096, 4096, multiprocessors=64).tile == (256, 256, 256)
    assert choose("sm_100a", "mxf4", 1024, 4096, 4096, multiprocessors=10_000).tile == (256, 128, 256)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_always_finds_one(arch, kind):
    for m in (1, 64, 129, 4096):
        for n in (8, 200, 4096):
            for k in (32, 160, 8192):
                for accumulate in (False, True):
                    chosen = choose(arch, kind, m, n, k, output="fp32", bias=True, accumulate=accumulate)
                    assert (chosen.arch, chosen.kind, chosen.output, chosen.bias, chosen.accumulate) == (
                        arch, kind, "fp32", True, accumulate)


def test_blocks_count_whole_clusters():
    assert LARGE.blocks(1, 1) == 2 and LARGE.blocks(257, 256) == 4 and LARGE.blocks(4096, 4096) == 512


def test_capabilities():
    assert set(ARCH_OF_CAPABILITY.values()) == set(ARCHS) == set(TABLE) == set(MULTIPROCESSORS)
    assert arch_of((10, 0)) == "sm_100a" and arch_of((9, 0)) is None


def operands(m=64, n=32, k=256):
    shapes = ((m, k // 2), (swizzled_size(m, k // 32),), (n, k // 2), (swizzled_size(n, k // 32),))
    return [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]


@pytest.mark.parametrize(("change", "message"), [
    ({}, "CUTLASS kernels run on a GPU, not on cpu"),
    ({"kind": "mxf5"}, "kind 'mxf5' does not exist; possible: mxf4"),
    ({"dtype": torch.float64}, "output dtype float64 is not possible"),
    ({"alpha": torch.ones(2)}, "alpha has to be 1 contiguous float32 on cpu, not 2"),
    ({"alpha": torch.ones(1, dtype=torch.float64)}, "alpha has to be 1 contiguous float32 .* not 1 float64"),
    ({"bias": torch.ones(32)}, "bias has to be 32 contiguous bfloat16 on cpu, not 32 float32"),
    ({"c": torch.ones(32, 64, dtype=torch.bfloat16)}, r"c has to be \[64, 32\] bfloat16 .* not \[32, 64\]"),
    ({"out": torch.ones(32, 64, dtype=torch.bfloat16).t()}, "out has to be .* with strides"),
    ({"kind": "nvf4"}, "a_scales has to be 2048 contiguous .* not 1024 uint8"),
])
def test_gemm_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        gemm(*operands(), **{"kind": "mxf4", **change})


def test_gemm_names_operands_that_do_not_fit():
    a, a_scales, b, b_scales = operands()
    with pytest.raises(ValueError, match=r"a \[64, 128\] on cpu and b \[32, 64\] on cpu do not fit"):
        gemm(a, a_scales, b[:, :64], b_scales, kind="mxf4")
    with pytest.raises(ValueError, match="a has to be a 2-D uint8 tensor for mxf4, its rows contiguous"):
        gemm(a.t(), a_scales, b, b_scales, kind="mxf4")
    with pytest.raises(ValueError, match="b has to be a 2-D uint8 tensor for nvf4.*not float32"):
        gemm(a, a_scales, b.float(), b_scales, kind="nvf4")
    with pytest.raises(ConfigurationError, match="need N a multiple of 8, not 30; pad it to 32"):
        gemm(a, a_scales, b[:30], b_scales, kind="mxf4")


def test_gemm_of_no_rows_is_empty():
    a, a_scales, b, b_scales = operands()
    assert gemm(a[:0], a_scales[:0], b, b_scales, kind="mxf4", dtype=torch.float32).shape == (0, 32)
