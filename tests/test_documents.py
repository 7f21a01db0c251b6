"""Paths that README, CONTRIBUTING and docs/ name exist, and so do the targets of make."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = "quartet|passes|lowering|kernels|runtime|tests|benchmarks|examples|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    code = re.findall(rf"(?<![\w./])((?:{ROOMS})/[\w/]+(?:\.\w+)*)", " ".join(re.findall(r"`([^`]+)`", text)))
    links = [page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert not [str(path) for path in (*(ROOT / name for name in code), *links) if not path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_exist(page):
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8"))) <= rules
