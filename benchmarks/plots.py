"""One picture of measured rows: what layouts of captions cost, and what the loss keeps in memory.

    python -m benchmarks.plots benchmarks.json --out docs/performance.png

In: the JSON of `python -m benchmarks`. Out: a PNG of two panels.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from .measures import Row, load

LAYOUTS = {"pad248": "open_clip, all at 248", "pad77+248": "open_clip, 77 and 248", "ours": "packed"}
COSTS = {
    "P1": "text tower:\nFLOPs",
    "P3": "text tower:\nbytes kept",
    "P2": "text tower:\ntime",
    "P5": "B/16 step:\ntime",
}
COLOURS = {"pad248": "#b8b8b8", "pad77+248": "#7f9bb8", "ours": "#c0562f"}
CURVE = "P8.at."


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("rows", type=Path, help="what python -m benchmarks --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args()
    draw({row.id: row for row in load(options.rows)}, options.out)


def draw(rows: Mapping[str, Row], out: Path) -> None:
    """Both panels, each of what the rows tell."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 3.8), width_ratios=(3, 2), layout="constrained"
    )
    _layouts(left, rows)
    _memory(right, rows)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def costs(rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """For every measured cost: layout -> its share of the cost with everything at 248 tokens."""
    found = {}
    for id in COSTS:
        if {f"{id}.pad248", f"{id}.pad77+248"} <= rows.keys():
            whole, parts = rows[f"{id}.pad248"], rows[f"{id}.pad77+248"]
            all_at_248 = whole.baseline or 0
            found[id] = {"pad248": 1, "pad77+248": (parts.baseline or 0) / all_at_248}
            found[id]["ours"] = whole.ours / all_at_248
    return found


def _layouts(axes: Axes, rows: Mapping[str, Row]) -> None:
    found = costs(rows)
    for turn, (layout, name) in enumerate(LAYOUTS.items()):
        shares = [of[layout] for of in found.values()]
        places = [place + 0.27 * (turn - 1) for place in range(len(shares))]
        bars = axes.bar(places, shares, 0.25, color=COLOURS[layout], label=name)
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=8, padding=2)
    axes.set_xticks(range(len(found)), [COSTS[id] for id in found])
    axes.set_ylabel("share of all at 248 tokens")
    axes.set_title("Eight sub-captions and a long one an image", fontsize=10)
    axes.set_ylim(0, 1.3)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=3)


def _memory(axes: Axes, rows: Mapping[str, Row]) -> None:
    curve = sorted((int(id.removeprefix(CURVE)), row) for id, row in rows.items() if id.startswith(CURVE))
    images = [count for count, _ in curve]
    peaks = {"pad77+248": [row.baseline or 0 for _, row in curve], "ours": [row.ours for _, row in curve]}
    for who, bytes in peaks.items():
        name = "tiles" if who == "ours" else "open_clip"
        axes.plot(images, [peak / 2**20 for peak in bytes], "o-", color=COLOURS[who], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(images, [f"{count:,}" for count in images])
    axes.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    axes.set_xlabel("images in the batch")
    axes.set_ylabel("peak memory, MiB")
    axes.set_title("InfoNCE with eight captions an image", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
