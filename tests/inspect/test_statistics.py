"""What records become: tables, lines of JSON, a page, scalars and histograms, spikes."""

import json
import math

import pytest
import torch

from quartet.inspect import Inspector, Record, Statistics
from quartet.inspect.records import product_errors
from quartet.kernels.reference.statistics import BINS, COLUMNS, LOWEST
from quartet.runtime.inspect.recorder import Row


def operand(step, amax, name="layers.0.up fprop x", error=0.01):
    values = dict.fromkeys(COLUMNS, 0.0) | {"amax": amax, "error": error, "unfolded": math.nan}
    histogram = torch.zeros(BINS, dtype=torch.float64)
    histogram[4 - LOWEST] = 3
    columns = torch.tensor(list(values.values()), dtype=torch.float64)
    return Row(step, "operand", (name,), torch.cat((columns, histogram)))


def statistics():
    return Statistics.of([
        operand(0, 2.0), operand(0, 1.0, "lm head 3 dgrad w", 0.2),
        Row(0, "product", ("layers.0.up wgrad",), torch.tensor([0.98, 0.04], dtype=torch.float64)),
        Row(10, "what-if", ("layers.0.up fprop x fp8",), torch.tensor([0.0009], dtype=torch.float64)),
        Row(10, "what-if", ("layers.0.up fprop w fp8",), torch.tensor([0.0016], dtype=torch.float64)),
        operand(10, 4.0, error=math.inf)])


def test_records_have_names_and_values():
    first, head, gradient, *_ = statistics()
    assert (first.layer, first.role, first.operand, first.scales) == ("layers.0.up", "fprop", "x", {4: 3})
    assert (head.layer, head.role, head.operand) == ("lm head 3", "dgrad", "w")
    assert gradient.values == {"cosine": 0.98, "error": 0.04} and gradient.snr == pytest.approx(13.98, abs=0.01)
    assert Record(0, "loss", "loss").snr != Record(0, "loss", "loss").snr


def test_the_table_has_the_last_step_of_each():
    table = statistics().table().splitlines()
    assert table[0].split() == ["operand", "or", "gradient", "amax", "rms", "underflow", "clipped", "error", "SNR",
                                "unfolded", "cosine"]
    assert len(table) == 4 and "4" in table[1] and "0.9800" in table[3]
    assert statistics().table(by="error", limit=1).splitlines()[1].startswith("layers.0.up fprop x")
    assert Statistics([]).table() == "nothing recorded yet"
    with pytest.raises(ValueError, match="possible: amax"):
        statistics().table(by="colour")


@pytest.mark.parametrize("ask, message", [
    (lambda s: s.where(layr="x"), "no field 'layr' of a record; did you mean 'layer'"),
    (lambda s: s.table(limit=-1), "limit is a number of rows, 0 or more, not -1"),
    (lambda s: s.spikes(math.nan), "factor is above 0"), (lambda s: s.spikes(history=2), "history 4 steps or more"),
])
def test_questions_that_cannot_be_meant(ask, message):
    for asked in (statistics(), Statistics([])):
        with pytest.raises(ValueError, match=message):
            ask(asked)


def test_what_if_adds_the_errors_of_both_operands():
    assert product_errors(statistics()) == {("layers.0.up", "fprop", "fp8"): pytest.approx(0.05)}
    assert "5.00%" in statistics().what_if()


def test_lines_of_json(tmp_path):
    statistics().to_jsonl(tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["scales"] == {"4": 3} and lines[0]["layer"] == "layers.0.up"
    assert lines[0]["snr"] == pytest.approx(20) and lines[5]["snr"] == "-inf"
    assert "unfolded" not in lines[0] and lines[5]["error"] == "inf" and lines[3]["recipe"] == "fp8"


def test_a_page_with_a_heat_map(tmp_path):
    statistics().to_html(tmp_path / "h.html", "error")
    text = (tmp_path / "h.html").read_text(encoding="utf-8")
    assert text.count("<tr>") == 3 and text.count('style="background') == 3 and text.count('class="bad"') == 1
    assert "layers.0.up fprop x, step 0: 0.01" in text
    escaped = Statistics([Record(0, "operand", "<b>&\"", "fprop", "x", values={"amax": 1.0})])
    escaped.to_html(tmp_path / "e.html", "amax")
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;&amp;&#34;" in text
    with pytest.raises(ValueError, match="possible: amax"):
        statistics().to_html(tmp_path / "x.html", "colour")


def test_tensorboard_gets_scalars_and_histograms():
    class Writer:
        def __init__(self):
            self.scalars, self.histograms = {}, {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag, step] = value

        def add_histogram(self, tag, values, step):
            self.histograms[tag, step] = values

        def flush(self):
            self.flushed = True

    writer = Writer()
    statistics().to_tensorboard(writer)
    assert writer.scalars["operand/layers.0.up/fprop/x/amax", 10] == 4.0 and writer.flushed
    assert writer.scalars["product/layers.0.up/wgrad/cosine", 0] == 0.98
    assert writer.histograms["operand/layers.0.up/fprop/x/log2 of scales", 0].tolist() == [4, 4, 4]
    assert not any(math.isnan(value) for value in writer.scalars.values())


def test_spikes():
    rows = [operand(step, 1.0 + 0.1 * (step % 2)) for step in range(8)] + [operand(8, 9.0), operand(9, math.nan)]
    found = Statistics.of(rows).spikes()
    assert [(s.step, s.column, s.usual) for s in found] == [(8, "amax", 1.05), (9, "amax", pytest.approx(1.1))]
    assert "step 8: amax of layers.0.up fprop x is 9, usually 1.05" == str(found[0])
    assert not Statistics.of(rows[:8]).spikes()


def test_a_loss_that_jumps():
    inspector = Inspector()
    for step, loss in enumerate((3.0, 2.9, 2.85, 2.8, 2.81, 2.75, 4.0)):
        inspector.recorder.step = step
        inspector.loss(torch.tensor(loss) if step % 2 else loss)
    spike, = inspector.statistics().spikes()
    assert (spike.step, spike.value) == (6, 4.0)
    inspector.clear()
    assert not len(inspector.statistics())
