"""Real pages for the site: what ``explain`` and the dump show of a small Llama, as on an H200.

    python docs/site/gallery.py docs/gallery
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
from llama import Llama, LlamaConfig

import quartet


def main(folder: Path) -> None:
    """Write ``explain.html`` and ``graphs/`` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Llama(LlamaConfig(dim=256, layers=2, heads=4, ffn=768), 64).to(torch.bfloat16)
    tokens = torch.randint(256, (8, 64))
    policy = quartet.Policy("quartet").on("*.down_proj", "mxfp8").on("blocks.0.*", "fp8")
    report = quartet.explain(model, tokens, tokens, target="h200",
                             options={"policy": policy, "dump": str(folder / "graphs")})
    report.graphs = "graphs/index.html"
    (folder / "explain.html").write_text(report.to_html(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
