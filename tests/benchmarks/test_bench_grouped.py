"""The benchmark of grouped products in miniature on a CPU: cases, groups, columns of which some fail, table, profile.

Peers are compiled with ``aot_eager``; our backend makes its graphs and runs them without generated code.
"""

import importlib
import json
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from uncompiled import uncompiled

from quartet.policy import Policy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MISSING = "no-such-recipe"
SHAPES = ("64x32x48x4", "swiglu-64x32x48x4", "fused-64x32x48x4")
COMMAND = ("--device", "cpu", "--compiler", "aot_eager", "--repeat", "2")


def stand_in():
    """A peer whose products are an eighth too large, and that insists on what torchao's takes."""
    def product(x, w, ends):
        assert w.stride(-2) == 1 and x.stride(-1) == 1 and ends.dtype == torch.int32
        return F.grouped_mm(x * 1.125, w, offs=ends)

    return product


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        loaded = {name: importlib.import_module(name) for name in ("gpu_common", "bench_linear", "bench_grouped")}
        patch.setattr(loaded["gpu_common"], "our_backend", lambda: uncompiled)
        patch.setattr(loaded["bench_grouped"], "peer_grouped_mm", stand_in)
        yield types.SimpleNamespace(**loaded)


@pytest.fixture
def bench(scripts):
    return scripts.bench_grouped


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(scripts, tmp_path_factory):
    """The record of a case of each form in columns of which one fails."""
    out = tmp_path_factory.mktemp("grouped") / "grouped.json"
    command = [*COMMAND, "--out", str(out), "--columns", f"bf16,torchao,{MISSING},fp8", "--shapes", ",".join(SHAPES)]
    scripts.bench_grouped.main(command)
    return command, out


def test_every_column_is_measured_and_a_failure_recorded(measured):
    results = read(measured[1])["results"]
    assert list(results) == list(SHAPES)
    for name, result in results.items():
        columns = result["columns"]
        assert list(columns) == ["bf16", "torchao", MISSING, "fp8"]
        assert f"unknown recipe {MISSING!r}" in columns[MISSING]["failed"]
        for column in ("bf16", "torchao", "fp8"):
            assert len(columns[column]["all_ms"]) == 2
            assert result["ratios"][column] == pytest.approx(columns["bf16"]["ms"] / columns[column]["ms"])
        assert set(columns["bf16"]["error"].values()) == {0.0}
        assert all(0.01 < e < 0.2 for e in columns["fp8"]["error"].values())
        off = columns["torchao"]["error"]["y"]
        assert off == pytest.approx(0.125, rel=0.1) if name == SHAPES[0] else 0.2 < off < 0.6
        sizes = result["group_sizes"]
        assert len(sizes) == 4 and sum(sizes) == 64 and not any(size % 16 for size in sizes)
        assert result["flops"] == (6 if name == SHAPES[0] else 18) * 64 * 32 * 48


def test_the_table_has_a_line_for_every_case_and_the_mean(measured, bench, capsys):
    command, out = measured
    before = read(out)
    bench.main([*command, "--time-limit", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert "time limit reached" in lines  # the failed column would be tried again
    heading, *rows, mean = lines[lines.index("time limit reached") + 1:]
    assert heading.split() == "tokens x in x out x experts bf16 ms bf16 torchao no-such-recipe fp8".split()
    assert [row.split()[0] for row in rows] == list(SHAPES) and all(row.split()[4] == "failed" for row in rows)
    ratios = read(out)["geometric_mean"]["ratios"]
    assert set(ratios) == {"bf16", "torchao", "fp8"} and f"{ratios['fp8']:.3f}" in mean
    assert mean.startswith("geometric mean, 3 of 3 cases") and read(out)["results"] == before["results"]
    with pytest.raises(ValueError, match="uneven True there, False here"):
        bench.main([*command, "--no-uneven"])


@pytest.mark.parametrize("uneven", (True, False))
@pytest.mark.parametrize("unit", (1, 16))
@pytest.mark.parametrize(("tokens", "experts"), ((16, 4), (1024, 1), (32768, 64)))
def test_groups_are_whole_units_and_take_all_tokens(bench, tokens, experts, unit, uneven):
    ends = bench.group_ends(tokens, experts, unit, uneven, seed=3)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert len(ends) == experts and ends[-1] == tokens and min(sizes) >= 0
    assert not any(size % unit for size in sizes)
    assert ends == bench.group_ends(tokens, experts, unit, uneven, seed=3)
    if tokens == 32768:
        mean = tokens // experts
        assert (min(sizes) < 0.6 * mean and max(sizes) > 1.5 * mean) if uneven else set(sizes) == {mean}


def test_every_form_is_that_of_each_expert(bench):
    torch.manual_seed(0)
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    one, swiglu, fused = (bench.Shape.parse(name, uneven=True, arbitrary=True, seed=1) for name in SHAPES)
    ends = list(one.ends)
    groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    assert any((g.stop - g.start) % 16 for g in groups)

    def by_expert(weight, tokens):
        return torch.cat([tokens[group] @ weight[e].t() for e, group in enumerate(groups)])

    single, apart, together = (shape.model().bfloat16() for shape in (one, swiglu, fused))
    torch.testing.assert_close(single(x), by_expert(single.proj, x))
    hidden = F.silu(by_expert(apart.gate, x)) * by_expert(apart.up, x)
    torch.testing.assert_close(apart(x), by_expert(apart.down, hidden))
    with torch.no_grad():
        together.gate_up.copy_(torch.cat((apart.gate, apart.up), 1))
        together.down.copy_(apart.down)
    torch.testing.assert_close(together(x), apart(x))
    assert [s.outputs for s in (one, swiglu, fused)] == [48, 32, 32]


def test_a_step_of_several_micro_batches(bench, tmp_path, capsys):
    out = tmp_path / "steps.json"
    bench.main([*COMMAND, "--out", str(out), "--columns", "bf16,fp8", "--shapes", SHAPES[0], "--micro-batches", "3"])
    (result,) = read(out)["results"].values()
    for data in result["columns"].values():
        assert data["later_ms"] > 0 and data["once_ms"] == pytest.approx(data["ms"] - 3 * data["later_ms"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    later = next(row for row in rows if row[:3] == ["a", "later", "micro-batch"])
    once = next(row for row in rows if row[:4] == ["once", "a", "step,", "ms"])
    assert later[4] == "1.00" and len(later) == 6 and len(once) == 6


def test_our_recipes_are_for_grouped_products_alone(bench):
    shape = bench.Shape.parse(SHAPES[0], uneven=True, arbitrary=False, seed=0)
    assert shape.policy("bf16") is None and shape.policy("torchao") is None
    assert shape.policy("fp8") == shape.policy("fp8:none") == Policy(None).on(op="grouped", recipe="fp8")


def test_arbitrary_groups_are_not_for_the_peer(bench, capsys):
    args = bench.parse(["--arbitrary", "--device", "cpu"])
    assert args.columns == ["bf16", "fp8", "fp8-rowwise", "quartet"]
    assert any(end % 16 for shape in args.shapes.values() for end in shape.ends)
    for more in (["--columns", "bf16,torchao"], ["--profile", "torchao"]):
        with pytest.raises(SystemExit):
            bench.parse(["--arbitrary", *more])
        assert "take groups of multiples of 16 tokens only" in capsys.readouterr().err
    assert bench.parse([]).columns == list(bench.COLUMNS) == ["bf16", "torchao", "fp8", "fp8-rowwise", "quartet"]


@pytest.mark.parametrize(("name", "message"), [
    ("64x32x48", "'64x32x48' is neither a group (goals, single, swiglu, fused) nor TOKENSxINxOUTxEXPERTS"),
    ("70x32x48x4", "has 70 tokens for 4 experts; groups of multiples of 16 need"),
    ("64x32x48x0", "has 64 tokens for 0 experts"),
])
def test_a_shape_that_is_none_is_refused(bench, name, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--shapes", name])
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_profile_names_what_takes_the_time(bench, tmp_path, capsys):
    bench.main([*COMMAND, "--profile", "bf16", "--shapes", SHAPES[0], "--out", str(tmp_path / "grouped.json")])
    rows = read(tmp_path / f"grouped-bf16-{SHAPES[0]}.json")
    products = next(row for row in rows if row["kernel"] == "aten::_grouped_mm")
    assert products["launches"] == 3 and 0 < products["share"] < 1
    assert "aten::_grouped_mm" in capsys.readouterr().out


def test_torchao_has_the_op_that_the_peer_is(scripts):
    """The stand-in hides the real one elsewhere; its arguments are those that the benchmark gives."""
    moe_training = pytest.importorskip("torchao.prototype.moe_training.fp8_grouped_mm")
    op = moe_training._to_fp8_rowwise_then_scaled_grouped_mm
    names = op.__code__.co_varnames[:op.__code__.co_argcount]
    assert names[:3] == ("A", "B_t", "offs") and "pad_token_groups_for_grouped_mm" in names
