"""The record of a matmul and the table of them all."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from quartet.lowering.recipe.records import MatmulRecord
from quartet.report.rows import rows
from quartet.report.table import Report
from quartet.report.text import human_bytes, percent, shorten


def record(fqn: str = "layers.0.q_proj", role: str = "fprop", site: int = 0, **changes) -> MatmulRecord:
    base = MatmulRecord(site, fqn, "linear", role, 64, 32, 16, "bfloat16", recipe="quartet", kernel="triton.mm",
                        saved_bytes=1024)
    return replace(base, **changes)


def alone(fqn: str, reason: str, **changes) -> MatmulRecord:
    return record(fqn, recipe=None, kernel=None, reason=reason, **changes)


def names(records: list[MatmulRecord]) -> list[str]:
    return [f"{row.name} ×{row.count}" for row in rows(records)]


def test_record_counts_flops_only_when_static():
    assert record().flops == 2 * 64 * 32 * 16
    assert record(m="s0*s1").flops is None


def test_record_knows_whether_it_is_lowered():
    assert record().lowered and not alone("a", "no kernel").lowered


def test_record_refuses_an_unknown_role():
    with pytest.raises(ValueError, match="'backward'.*fprop, dgrad, wgrad"):
        record(role="backward")


def test_record_as_dict_is_json():
    data = record(notes=("padded",)).as_dict()
    assert json.loads(json.dumps(data)) == data
    assert (data["notes"], data["flops"], data["lowered"]) == (["padded"], 65536, True)


def test_equal_layers_share_a_row():
    records = [record(f"model.layers.{i}.q_proj", site=i) for i in range(8)]
    assert names(records) == ["model.layers.{0..7}.q_proj ×8"]
    assert len(rows(records, collapse=False)) == 8


def test_a_layer_that_differs_keeps_its_own_row():
    records = [record(f"layers.{i}.q", site=i, kernel=None if i in (0, 5) else "k") for i in range(6)]
    assert names(records) == ["layers.{0,5}.q ×2", "layers.{1..4}.q ×4"]


@pytest.mark.parametrize("column, value", [("m", 65), ("dtype", "float16"), ("recipe", "fp8"), ("saved_bytes", 1),
                                           ("notes", ("n",)), ("op_class", "bmm"), ("role", "dgrad")])
def test_every_column_but_the_name_separates_rows(column, value):
    assert len(rows([record("l.0.q"), record("l.1.q", site=1, **{column: value})])) == 2


def test_products_of_indices_collapse_and_the_rest_splits():
    grid = [record(f"l.{i}.e.{j}.w", site=9 * i + j) for i in range(3) for j in range(4)]
    assert names(grid) == ["l.{0..2}.e.{0..3}.w ×12"]
    assert names(grid[1:]) == ["l.0.e.{1..3}.w ×3", "l.{1,2}.e.{0..3}.w ×8"]


def test_numbers_inside_a_word_are_not_indices():
    assert names([record("l.0.w1"), record("l.0.w2", site=1)]) == ["l.0.w1 ×1", "l.0.w2 ×1"]


def test_a_module_called_twice_counts_twice():
    assert names([record("head"), record("head", site=1)]) == ["head ×2"]


def test_matmuls_without_a_module_are_named_by_site():
    assert names([record("", site=7)]) == ["matmul 7 ×1"]


def test_rows_stand_by_site_then_role_whatever_the_order_of_records():
    records = [record("b", "wgrad", 1), record("a", "wgrad", 0), record("b", "fprop", 1), record("a", "fprop", 0)]
    assert [(r.name, r.record.role) for r in rows(records)] == [
        ("a", "fprop"), ("a", "wgrad"), ("b", "fprop"), ("b", "wgrad")]


def test_shares_are_by_flops():
    report = Report([record("a", k=100), alone("b", "small", k=300, site=1), record("a", "dgrad", k=100)])
    assert report.flops_share("fprop") == 0.25
    assert report.flops_share("dgrad") == 1.0
    assert report.flops_share("wgrad") is None
    assert report.flops_share() == 0.4


def test_symbolic_sizes_are_said_not_guessed():
    report = Report([record("a"), alone("b", "why", m="s0", site=1)])
    assert report.flops_share() == 1.0
    assert "1 with symbolic sizes not counted" in str(report)
    assert Report([record(m="s0")]).flops_share() is None


def test_lowered_and_left_alone_partition_the_records():
    report = Report([record("a"), alone("b", "why", site=1)])
    assert [r.fqn for r in report.lowered] == ["a"] and [r.fqn for r in report.left_alone] == ["b"]
    assert list(report) == [*report.lowered, *report.left_alone] and len(report) == 2


def test_reasons_are_counted_and_a_missing_one_shows():
    report = Report([alone("a", "x"), alone("b", "x", site=1), alone("c", "", site=2)])
    assert report.reasons == {"x": 2, "no reason recorded": 1}


def test_text_has_totals_and_numbered_remarks():
    text = str(Report([record("a", notes=("padded k 80 → 96",)), alone("b", "class skipped", site=1)],
                      saved_bytes_total=3 << 20, policy="quartet", notes=("two graphs",)))
    lines = text.splitlines()
    assert "policy quartet" in lines[0]
    assert "lowered   1 of 2 matmuls" in lines
    assert "kept      3.0 MiB between forward and backward" in lines
    assert "[1]       1 × class skipped" in lines and "[2]       1 × padded k 80 → 96" in lines
    assert "note      two graphs" in lines
    assert next(line for line in lines if line.startswith("a ")).endswith("[2]")
    assert next(line for line in lines if line.startswith("b ")).endswith("[1]")


def test_kept_bytes_sum_over_records_when_no_total_is_given():
    assert Report([record("a"), record("b", site=1, saved_bytes=None)]).saved_bytes_total == 1024
    assert Report([record("a", saved_bytes=None)]).saved_bytes_total is None


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 160])
def test_table_fits_however_long_the_entries(width):
    long = record("model.decoder.transformer.layers.11.feed_forward.experts.down_projection.linear" * 2,
                  kernel="cutlass.sm100_mxfp4_mxfp4_256x256x128_2sm_with_epilogue_mask_and_rotation",
                  recipe="a-recipe-with-a-very-long-name", op_class="attention_qk", m="s0*s1*s2 + 12345678",
                  n=1234567, k=7654321, notes=tuple(f"note {i}" for i in range(12)), saved_bytes=1023 << 30)
    lines = Report([long, record("x", site=1)]).table(width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[2].startswith("mod") and "…" in lines[2]
    assert width < 80 or "fprop" in lines[2]
    assert width < 120 or "1023.0 GiB" in lines[2]


def test_table_refuses_to_be_narrow():
    with pytest.raises(ValueError, match="at least 60 columns wide, not 59"):
        Report([record()]).table(width=59)


def test_a_narrow_report_wraps_its_lines_and_leaves_columns_out():
    report = Report([record(f"layers.{i}.attention.projection", site=i, notes=("a remark " * 20,)) for i in range(3)],
                    policy="Policy('quartet')" * 3, device="a device " * 5)
    lines = report.text(70).splitlines()
    assert max(map(len, lines)) <= 70 and "dtype" not in report.table(width=70) and "dtype" in report.table()


def test_a_report_comes_back_from_its_data_and_shows_what_changed():
    report = Report([record("a"), record("b", site=1)], 3 << 20, policy="fp8", notes=["a note"])
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert str(again) == str(report) and not (again - report) and str(again - report) == "nothing changed"
    other = Report([record("a", kernel=None, recipe=None, reason="too small"), record("c", site=1)], 1 << 20)
    text = str(other - report)
    assert "a fprop: " in text and "left alone (too small)" in text and "→ not there" in text and "not there →" in text
    assert {c.record.fqn for c in other - report} == {"a", "b", "c"}
    smaller = Report([record("a", m=5), record("b", site=1)], 3 << 20, policy="fp8")
    assert "5 ×" in str(smaller - report)


def test_empty_report_prints():
    assert "lowered   0 of 0 matmuls" in str(Report([]))


def test_dict_is_json_and_uncollapsed():
    report = Report([record(f"l.{i}.q", site=i) for i in range(3)], device="cpu")
    data = json.loads(json.dumps(report.to_dict()))
    assert [m["fqn"] for m in data["matmuls"]] == ["l.0.q", "l.1.q", "l.2.q"]
    assert data["flops_share"] == {"fprop": 1.0, "dgrad": None, "wgrad": None, "total": 1.0}
    assert (data["lowered"], data["total"], data["device"], data["saved_bytes_total"]) == (3, 3, "cpu", 3072)


class _Balanced(HTMLParser):
    """Collects the text and checks that every tag that opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_escapes_what_comes_from_outside():
    parser = _Balanced()
    page = Report([alone("<script>evil</script>", "a < b & c")], notes=("<b>",)).to_html()
    parser.feed(page)
    assert parser.open == [] and page.count("<script>") == 1 and "<b><" not in page
    assert "<script>evil</script>" in parser.text and "a < b & c" in parser.text
    assert "http" not in page and "src=" not in page and "url(" not in page


def test_a_page_has_a_row_a_group_that_unfolds_and_a_notebook_keeps_its_own_style():
    report = Report([record(f"l.{i}.q", site=i) for i in range(3)])
    for shown in (report._repr_html_(), report.to_html()):
        assert shown.count("<tr class=") == 1 and "l.{0..2}.q</summary>" in shown
        assert all(f"<div>l.{i}.q</div>" in shown for i in range(3))
    assert "<html" not in report._repr_html_() and "body {" not in report._repr_html_()


def test_a_page_sums_up_what_was_left_alone_by_its_flops():
    page = Report([alone("a", "too small"), record("b", site=1)], predicted=1.25, graphs="graphs/index.html").to_html()
    assert "50.0 %</td><td class=\"text\">too small" in page and "1.25×" in page
    assert 'href="graphs/index.html"' in page


@pytest.mark.parametrize("width", [3, 4, 9, 10])
def test_shorten_keeps_both_ends(width):
    short = shorten("abcdefghijk", width)
    assert len(short) == width and short[0] == "a" and short[-1] == "k" and short.count("…") == 1
    assert shorten("abc", 3) == "abc"


@pytest.mark.parametrize("count, text", [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"),
                                         (5 << 40, "5.0 TiB")])
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_a_share_is_all_or_nothing_only_where_it_is():
    assert [percent(share) for share in (None, 0, 1e-4, 0.625, 0.9999, 1.0)] == [
        "–", "0.0 %", "<0.1 %", "62.5 %", ">99.9 %", "100.0 %"]
