"""``structure.py``: each measure counts what it says, wherever the rooms lie."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "quartet/__init__.py": "",
    "passes/one.py": "from quartet.passes import two\nassert node.args[0]\nnode.args[1] = x  # type: ignore[index]\n",
    "passes/two.py": "from quartet.passes.one import f\nrest = node.args[2:]\n",
    "lowering/ir/ops/core.py": "library.define('f() -> ()')\na, b = node.args[0], node.args[1]\n",
    "lowering/targets/cpu/ops.py": "def f():\n    from quartet.lowering.targets.triton import ops\n",
    "lowering/targets/triton/ops.py": "ir.library.define('g() -> ()')\nfrom quartet.lowering.ir import core\n",
    "kernels/triton/quantize/rows.py": "@triton.jit\ndef small(x, N: tl.constexpr):\n    pass\n\n\n"
                              "@triton.jit(do_not_specialize=['a'])\ndef large(a, b, c, *, d):\n    pass\n",
    "runtime/slots/state.py": "",
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("structure")


@pytest.fixture
def house(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_measures_of_a_small_house(script, house):
    found = dict(script.measures(script.sources(house)))
    assert found[".args[…] read in passes"] == "2" and found[".args[…] read in lowering"] == "2"
    assert found[".args[…] read in both, outside lowering/ir"] == "2"
    assert found["assert in passes"] == "1" and found["type: ignore in passes and lowering"] == "1"
    assert found["library.define"] == "2"
    assert found["most files in a folder of passes"] == "2 in passes/"
    assert found["file names that occur twice"] == "1: ops.py"
    assert found["most parameters of a Triton kernel"] == "4 of large in kernels/triton/quantize/rows.py"
    assert found["import circles"] == "1: quartet.passes.one → quartet.passes.two → quartet.passes.one"
    targets = "quartet.lowering.targets"
    assert found["imports between targets"] == f"1: {targets}.cpu.ops → {targets}.triton.ops"
    assert found["files"] == str(len(FILES))


def test_links_to_the_rooms_count_once(script, house):
    before = script.measures(script.sources(house))
    for room in ("passes", "lowering", "kernels", "runtime"):
        (house / "quartet" / room).symlink_to(f"../{room}")
    assert script.measures(script.sources(house)) == before


def test_the_package_is_found(script):
    found = dict(script.measures(script.sources()))
    assert int(found["files"]) > 100 and found["import circles"] == "0"
