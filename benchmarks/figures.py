"""The figures of the README, from files that the programs write which measure them.

    python benchmarks/figures.py --demo demo-out/result.json      # takes up a run of the demo
    python benchmarks/figures.py                                  # writes README's tables and the plot anew

``docs/figures.json`` holds them, each with its hardware and command. Between the marks ``<!-- figures: NAME -->`` and
``<!-- end -->`` README is written by this program, and a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES, README, PLOT = ROOT / "docs" / "figures.json", ROOT / "README.md", ROOT / "docs" / "figures.svg"
POINTS = 120  # of a curve


def demo_of(result: dict[str, Any]) -> dict[str, Any]:
    """What README says of a run of the demo."""
    runs, comparison = result["runs"], result["comparison"]
    ours, peer = runs["quartet"], runs["inductor"]
    every = max(1, len(ours["losses"]) // POINTS)
    cpu = result["device"] == "cpu"
    return {
        "machine": f"{result['threads']} threads of a {_processor()}" if cpu else result["device"],
        "torch": result["torch"], "steps": result["steps"], "bytes_a_step": result["batch"] * result["seq"],
        "command": "make demo", "gaps": comparison.get("validation_gaps", [comparison["validation_gap"]]),
        **{name: {"validation_loss": run["validation_loss"], "step_ms": 1e3 * run["median_step_s"],
                  "kept_mb": run["saved_bytes"] / 1e6,
                  "losses": [round(loss, 4) for loss in _smooth(run["losses"])[::every]]}
           for name, run in (("quartet", ours), ("inductor", peer))},
        "predicted": result["predicted"],
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.machine()


def _smooth(losses: list[float]) -> list[float]:
    out, mean = [], 0.0
    for i, loss in enumerate(losses, 1):
        mean = 0.9 * mean + 0.1 * loss
        out.append(mean / (1 - 0.9**i))
    return out


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """The blocks of README by name."""
    demo = figures["demo"]
    ours, peer, gaps = demo["quartet"], demo["inductor"], demo["gaps"]
    spread = f" ({min(gaps):+.3f} to {max(gaps):+.3f} over {len(gaps)} roundings)" if len(gaps) > 1 else ""
    shown = [
        f"`{demo['command']}` on {demo['machine']}, PyTorch {demo['torch']}, {demo['steps']} steps of "
        f"{demo['bytes_a_step']} bytes:", "",
        "| | `quartet` | Inductor | |", "|---|---|---|---|",
        f"| validation loss, nats a byte | {ours['validation_loss']:.3f} | {peer['validation_loss']:.3f} | gap "
        f"{sum(gaps) / len(gaps):+.3f}{spread} |",
        f"| step, ms | {ours['step_ms']:.0f} | {peer['step_ms']:.0f} | {ours['step_ms'] / peer['step_ms']:.2f}× |",
        f"| kept for backward, MB | {ours['kept_mb']:.1f} | {peer['kept_mb']:.1f} | "
        f"{ours['kept_mb'] / peer['kept_mb']:.2f}× |",
    ]
    step = figures["step"]
    measured = [f"{step['what']} on {step['machine']}, times the speed of BF16 under Inductor, and peak memory:", "",
                "| | speed | memory |", "|---|---|---|",
                *(f"| {row['name']} | {row['speed']:.2f}× | {row['memory']:.2f} |" for row in step["rows"])]
    return {"demo": "\n".join(shown), "step": "\n".join(measured)}


def written(readme: str, blocks: dict[str, str]) -> str:
    """README with its blocks written anew."""
    for name, text in blocks.items():
        mark = f"<!-- figures: {name} -->"
        block = f"{mark}\n{text}\n<!-- end -->"
        readme, count = re.subn(rf"{mark}.*?<!-- end -->", block.replace("\\", r"\\"), readme, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} blocks {mark} … <!-- end -->, not one")
    return readme


def plot(figures: dict[str, Any], path: Path) -> None:
    """Losses over each other, and speed and memory as bars."""
    import matplotlib
    from matplotlib.figure import Figure

    demo, step = figures["demo"], figures["step"]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, speed, memory = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    for name, colour in (("inductor", "tab:blue"), ("quartet", "tab:orange")):
        curve = demo[name]["losses"]
        losses.plot([i * demo["steps"] / len(curve) for i in range(len(curve))], curve, color=colour, label=name)
    losses.set(title="training loss of the demo", xlabel="step", ylabel="nats a byte")
    losses.legend()
    rows = [{"name": "BF16", "speed": 1.0, "memory": 1.0}, *step["rows"]]
    names = [row["name"].replace("`", "") for row in rows]
    colours = ["tab:blue", *("tab:gray" if "torchao" in name else "tab:orange" for name in names[1:])]
    for axes, key, title in ((speed, "speed", "speed of a step"), (memory, "memory", "peak memory")):
        bars = axes.barh(names, [row[key] for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
        axes.set(title=f"{title}, {step['machine']}", xlim=(0, 1.2 * max(row[key] for row in rows)))
        axes.invert_yaxis()
        axes.tick_params(labelsize="small")
    memory.set_yticklabels([])
    for axes in (losses, speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "quartet", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="FILE", help="result.json of the demo")
    args = parser.parse_args(argv)
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    if args.demo:
        figures["demo"] = demo_of(json.loads(args.demo.read_text(encoding="utf-8")))
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    README.write_text(written(README.read_text(encoding="utf-8"), tables(figures)), encoding="utf-8")
    plot(figures, PLOT)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
