"""Speed against size: the ratios to BF16 that ``bench_linear.py`` measured, as an SVG.

    python benchmarks/plot.py bench-out/bench_linear.json --out docs/speed.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def points(data: dict[str, Any], column: str, mlp: bool) -> list[tuple[float, float]]:
    """(floating-point operations, ratio) of a column's linear layers or MLPs, by size."""
    return sorted((result["flops"], result["ratios"][column]) for result in data["results"].values()
                  if result["mlp"] is mlp and column in result["ratios"])


def draw(data: dict[str, Any], path: Path) -> list[str]:
    """Write the picture; the columns in it, all of those measured but the baseline.

    Raises:
        ValueError: the file has no ratio to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"the picture needs matplotlib ({error}): run `pip install matplotlib`") from None

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": "quartet"}):  # the same picture is the same file
        return _draw(data, path)


def _draw(data: dict[str, Any], path: Path) -> list[str]:
    import matplotlib.pyplot as plt

    columns = list(dict.fromkeys(c for result in data["results"].values() for c in result["ratios"] if c != "bf16"))
    if not columns:
        raise ValueError("there is no ratio to draw: bf16 and another column have to be measured, see bench_linear.py")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, column in enumerate(columns):
        for mlp, style in ((False, "o-"), (True, "s--")):
            if drawn := points(data, column, mlp):
                axes.plot(*zip(*drawn, strict=True), style, color=f"C{i}", markersize=4, linewidth=1,
                          label=f"{column}{', SwiGLU' if mlp else ''}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="operations of the products, forward and backward", ylabel="speed, BF16 = 1",
             title=f"{data['settings']['device']}, torch {data['settings']['torch']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return columns


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the JSON of bench_linear.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside it, as .svg")
    args = parser.parse_args(argv)
    path = args.out or args.file.with_suffix(".svg")
    columns = draw(json.loads(args.file.read_text(encoding="utf-8")), path)
    print(f"{path}: {', '.join(columns)}")


if __name__ == "__main__":
    main()
