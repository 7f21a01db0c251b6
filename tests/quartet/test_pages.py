"""The pages in a browser, where Chromium is installed: they fit a wide and a narrow window, and search, sort, filter,
unfold and zoom work, with 900 rows too."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from quartet.lowering.recipe.records import MatmulRecord
from quartet.report.dump import GraphDump
from quartet.report.table import Report

RECORD = MatmulRecord(0, "layers.0.q", "linear", "fprop", 4, 32, 64, "float32", "quartet", "reference")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]

TRY = """
<script>
const all = selector => [...document.querySelectorAll(selector)], shown = () => all("tr[data-role]").filter(
  row => !row.hidden), set = (box, value) => { box.value = value; box.dispatchEvent(new Event("input")); };
const done = {wide: document.documentElement.scrollWidth, window: innerWidth, rows: all("tr[data-role]").length};
const search = all("[data-search]")[0], role = all("[data-filter=role]")[0], heads = all("[data-table] th");
const begin = performance.now();
set(search, "left special");
done.found = shown().length;
set(search, "");
set(role, "dgrad");
done.dgrad = shown().length;
set(role, "");
heads[4].click(); heads[4].click();
done.ms = performance.now() - begin;
done.first = shown()[0].cells[0].textContent.trim();
const svg = all("[data-drawing] svg")[0];
if (svg) { const before = svg.getBoundingClientRect().width; all("[data-zoom]")[0].click();
  done.zoom = svg.getBoundingClientRect().width / before; }
document.body.dataset.done = JSON.stringify(done);
</script>"""


def looked_at(page, folder, width):
    """What the script at the end of a page finds in a window of this width."""
    path = folder / f"tried{width}.html"
    path.write_text(page.read_text().replace("</body>", f"{TRY}</body>"))
    ran = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
                          f"--user-data-dir={folder}/profile", "--dump-dom", path.as_uri()], capture_output=True,
                         text=True, timeout=600)
    found = re.search(r'data-done="([^"]*)"', ran.stdout)
    assert found, ran.stdout[-500:] + ran.stderr[-500:]
    return json.loads(found[1].replace("&quot;", '"'))


@pytest.mark.parametrize("width", [1400, 500])
def test_a_page_of_many_rows(tmp_path, width):
    records = [replace(RECORD, site=i, fqn=f"block{i}.layer", m=4 + i, role="dgrad" if i % 3 else "fprop") for i in
               range(900)]
    records[7] = replace(records[7], kernel=None, reason="special")
    page = tmp_path / "explain.html"
    page.write_text(Report(records).to_html())
    seen = looked_at(page, tmp_path, width)
    assert seen["wide"] <= seen["window"] and seen["rows"] == 900
    assert (seen["found"], seen["dgrad"], seen["first"]) == (1, 600, "block899.layer")
    assert seen["ms"] < 2000


@pytest.mark.parametrize("width", [1400, 500])
def test_a_page_of_a_dump(tmp_path, width):
    dump = GraphDump(tmp_path / "graphs", about={"policy": "fp8"})
    gm = make_fx(lambda x, w: (x @ w).relu() @ w, tracing_mode="fake")(torch.ones(4, 4), torch.ones(4, 4))
    dump.before(0, "quantize", gm)
    dump.after(0, "quantize", make_fx(lambda x, w: x @ w, tracing_mode="fake")(torch.ones(4, 4), torch.ones(4, 4)), 0.1)
    dump.finish([RECORD], gm)
    page = tmp_path / "graphs" / "graph_000" / "index.html"
    seen = looked_at(page, page.parent, width)
    assert seen["wide"] <= seen["window"] and seen["zoom"] == pytest.approx(1.25, rel=0.01)
