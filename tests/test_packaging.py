"""The wheel works away from the checkout: its contents, its entry point, a first step of training with it."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BESIDE = ("MANIFEST.in", "Makefile", "CONTRIBUTING.md", "constraints.txt", "docs", "examples", "benchmarks", "tests")
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "quartet", "passes", "lowering", "kernels", "runtime")

TRAIN_ONE_STEP = """
import json, sys, torch
listed = "quartet" in torch.compiler.list_backends()
imported_early = "quartet" in sys.modules
torch.manual_seed(0)
model = torch.nn.Linear(64, 32, bias=False)
before = model.weight.detach().clone()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(64, 64)
loss = torch.compile(model, backend="quartet")(x).square().mean()
loss.backward()
optimizer.step()
import quartet
exact = 2 * (x @ before.T).T @ x / (64 * 32)
error = (model.weight.grad - exact).norm() / exact.norm()
print(json.dumps({"listed": listed, "imported_early": imported_early, "file": quartet.__file__,
                  "version": quartet.__version__, "error": error.item(), "loss": loss.item()}))
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run this interpreter and return its standard output; a failure shows all that it said."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, f"{' '.join(arguments)[:200]} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with what is shipped, so that builds leave nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*BESIDE, *SHIPPED):
        (folder / name).symlink_to(ROOT / name)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    python("-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet",
           "--wheel-dir", str(folder), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked as ``pip install --target`` does, and nothing beside it."""
    target = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", str(wheel), "--no-deps", "--no-index", "--quiet", "--target", str(target),
           cwd=target)
    return target


def test_every_source_file_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for room in SHIPPED[3:]:
        for pattern in ("*.py", "*.cpp", "*.cu.in", "py.typed", "*.html", "*.css", "*.js"):
            for path in (ROOT / room).rglob(pattern):
                relative = path.relative_to(ROOT).as_posix()
                expected.add(relative if room == "quartet" else f"quartet/{relative}")
    assert any(name.endswith(".cpp") and name.startswith("quartet/kernels/cpu/") for name in expected)
    assert expected <= inside, f"not in the wheel: {sorted(expected - inside)}"


def test_nothing_else_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"quartet", f"torch_quartet-{PROJECT['version']}.dist-info"}


def test_the_rooms_are_where_their_import_path_says():
    """What reads the source, such as an editor or a type checker, finds ``quartet.passes`` in ``quartet/passes``."""
    for room in SHIPPED[4:]:
        link = ROOT / "quartet" / room
        assert link.is_symlink() and link.resolve() == ROOT / room, f"{link} is no link to ../{room}"


def test_a_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source), cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert {"Makefile", "CONTRIBUTING.md", "constraints.txt", "docs/architecture.md", "examples/train_llama.py",
            "benchmarks/cpu_step.py", "tests/conftest.py"} <= inside
    again = build_wheel(archive, tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"torch_quartet-{PROJECT['version']}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("torch-quartet", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "[torch_dynamo_backends]\nquartet = quartet.backend:quartet" in entry_points


def test_constraints_pin_every_direct_dependency():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["test"], *extras["demo"]]
    names = {re.split("[>=;]", requirement)[0].strip() for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert names <= pinned, f"not pinned in constraints.txt: {sorted(names - pinned)}"


def test_the_entry_point_trains_away_from_the_checkout(installed, tmp_path):
    """An editable install of the checkout may be in the same environment: the copy on PYTHONPATH has to win."""
    printed = python("-c", TRAIN_ONE_STEP, cwd=tmp_path, PYTHONPATH=str(installed), OMP_NUM_THREADS="1",
                     TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), QUARTET_CACHE_DIR=str(tmp_path / "quartet"))
    result = json.loads(printed.splitlines()[-1])
    assert result["listed"], "torch.compiler.list_backends() does not name quartet"
    assert not result["imported_early"], "listing the backends imported quartet"
    assert Path(result["file"]).is_relative_to(installed)
    assert result["version"] == PROJECT["version"]
    assert 0.01 < result["error"] < 0.5, "the gradient should be that of 4-bit GEMMs: close to the exact one, not equal"


def test_nothing_is_imported_before_it_is_used(installed, tmp_path):
    program = ("import sys, time; import quartet; early = 'torch' in sys.modules; import torch; "
               "print(early, quartet.optim.__name__, quartet.direct.__name__, quartet.extend.__name__, "
               "quartet.explain.__module__, all(hasattr(quartet, name) for name in quartet.__all__), "
               "isinstance(quartet.recipes, type(lambda: 0)))")
    printed = python("-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.split() == ["False", "quartet.optim", "quartet.direct", "quartet.extend", "quartet.explain", "True",
                               "True"]


def test_the_command_line_is_installed(installed, tmp_path):
    assert "usage" in python("-m", "quartet", "--help", cwd=tmp_path, PYTHONPATH=str(installed)).lower()
