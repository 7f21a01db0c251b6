"""What the site of the documentation has beside ``docs``: README as its first page, CONTRIBUTING, the API, a gallery of
real pages; links to files of the repository that are no pages become plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
API = """# API

Everything below is imported from `quartet`, or from the module that its name says, which `import quartet` gives too.

{entries}
"""
GALLERY = """# Gallery

Real pages of a small Llama under a mixed policy, as on an H200: [what explain shows](gallery/explain.html), and
[the dump of its graphs](gallery/graphs/index.html), of which this is the first.

<iframe src="../gallery/graphs/graph_000/index.html" title="a dump" style="width:100%;height:80vh;border:0"></iframe>
"""
NAMES = {
    "Compiling and seeing": ("compile", "explain", "suggest", "replay", "statistics"),
    "Policies": ("Policy", "Rule", "recipes", "register"),
    "Recipes": ("Recipe", "Gemm", "Operand", "Rotation", "QuantSpec", "Delayed", "Saved"),
    "The inspector": ("inspect.Inspector", "inspect.Statistics", "inspect.Record", "inspect.Spike", "inspect.finite",
                      "inspect.NotFinite"),
    "State from step to step": ("state_dict", "load_state_dict", "State"),
    "Optimizers": ("optim.AdamW", "optim.Adam", "optim.Lion", "optim.SGD", "optim.QRamping", "optim.StateFormat"),
    "Weights that are codes": ("direct.convert", "direct.Optimizer", "direct.export", "direct.load", "direct.bitnet"),
    "Several processes": ("distributed.pack_all_gather",),
    "Extending": ("register_pass", "extend.Stage", "extend.register_kernel", "extend.Kernel", "extend.register_element",
                  "extend.Element", "extend.register_op_class"),
}

HOMES = {  # of functions that are called like the module that they are in
    **{name: f"{name}.{name}" for name in ("compile", "explain", "statistics", "recipes")},
    **{f"direct.{name}": f"runtime.direct.{name}.{name}" for name in ("convert", "export", "bitnet")},
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs``."""
    made = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "api.md": API.format(entries="\n\n".join(_group(title, names) for title, names in NAMES.items())),
    }
    made["site.css"] = Path(__file__).with_name("site.css").read_text(encoding="utf-8")
    there = (ROOT / "docs" / "gallery" / "explain.html").exists()
    made["gallery.md"] = GALLERY if there else "# Gallery\n\n`make site` writes the pages that belong here.\n"
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def _group(title: str, names: Sequence[str]) -> str:
    return "\n\n".join((f"## {title}", *(
        f"::: quartet.{HOMES.get(name, name)}\n    options:\n      heading: quartet.{name}" for name in names)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Keep the links that lead to pages; of others the words."""
    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        path = target.partition("#")[0].replace("../README.md", "index.md").replace("../CONTRIBUTING.md",
                                                                                  "contributing.md")
        if re.match(r"https?:|#|mailto:", target) or files.get_file_from_path(path) is not None:
            return f"[{words}]({target.replace(target.partition('#')[0], path, 1) if path else target})"
        return words

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, markdown)
