"""The recipes side by side on the embedded scenes: equal steps, several seeds, mean and spread.

    python -m benchmarks.recipes                        # every recipe, three seeds
    python -m benchmarks.recipes --seeds 1 --samples 4800 --recipes clip long

Every run is `python train.py recipe=... seed=... name=...`; a run that is already there is not repeated,
an unfinished one goes on. Prints a table, and writes docs/recipes.md, docs/recipes.json and docs/recipes.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.report import length_curves, plot_lengths
from longclip import runs
from longclip.data.converting.workers import processors

RECIPES = {
    "clip": ["recipe=clip"],
    "long": ["recipe=long"],
    "longclip": ["recipe=longclip"],
    "longclip, no smoothing": [
        "recipe=longclip",
        "recipe.terms.long.label_smoothing=0",
        "recipe.terms.short.label_smoothing=0",
    ],
    "longclip, no short": ["recipe=longclip", "~recipe.terms.short", "~recipe.captions.short"],
    "dreamlip": ["recipe=dreamlip"],
    "dreamlip without grouping": ["recipe=dreamlip", "~recipe.terms.grouping"],
    "dreamlip, threshold 0.5": ["recipe=dreamlip", "recipe.terms.grouping.threshold=0.5"],
    "debias": ["recipe=debias"],
}

COLUMNS = {
    "long i2t": "scenes/long/i2t_r1",
    "long t2i": "scenes/long/t2i_r1",
    "short i2t": "scenes/short/i2t_r1",
    "short t2i": "scenes/short/t2i_r1",
    "distractors i2t": "scenes/distractors/long/i2t_r1",
    "distractors t2i": "scenes/distractors/long/t2i_r1",
    "pointing": "scenes/pointing/accuracy",
}

Results = dict[str, list[dict[str, float]]]
"""Recipe -> one flat name -> number for every seed."""


def main() -> None:
    options = _options()
    todo = [(name, seed) for seed in range(options.seeds) for name in options.recipes]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: _train(job[0], job[1], options), todo))
    results: Results = {name: [] for name in options.recipes}
    for (name, _), metrics in zip(todo, found, strict=True):
        results[name].append(metrics)
    curves = {name: _means([length_curves(m)["scenes"] for m in found]) for name, found in results.items()}
    spreads = {name: _spreads([length_curves(m)["scenes"] for m in found]) for name, found in results.items()}
    Console(width=None if sys.stdout.isatty() else 150).print(_table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recipes.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "recipes.md").write_text(markdown(results, options))
    plot_lengths(curves, options.out / "recipes.png", spreads)
    print(f"wrote {options.out}/recipes.md, recipes.json and recipes.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16_000, help="images that every run trains on")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each on its share of cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    return parser.parse_args()


def _train(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One training in a process of its own; its final judgement."""
    run = options.runs / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}"
    train(run, [*RECIPES[name], f"seed={seed}"], options.samples, max(processors() // options.jobs, 1))
    metrics: dict[str, float] = json.loads((run / "metrics.json").read_text())
    return metrics


def train(run: Path, overrides: Sequence[str], samples: int, threads: int) -> None:
    """`python train.py` in a process of its own; an unfinished run goes on, a finished one is left alone."""
    if finished(run, samples):
        return
    started = time.monotonic()
    command = [sys.executable, "train.py", *overrides, f"samples={samples}", "export=null"]
    command += [f"runs={run.parent}", f"name={run.name}", "resume=auto"]
    command += ["data.workers=0"] if threads == 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    print(f"{run}: {time.monotonic() - started:.0f} s", flush=True)


def finished(run: Path, samples: int) -> bool:
    """Whether a run was judged at its end."""
    found = runs.judgements(run)
    return bool(found) and found[-1]["samples_seen"] >= samples * 0.98  # whole batches only


def _table(results: Results) -> Table:
    table = Table("recipe", *COLUMNS, "pointing by chance", title="mean over seeds (lowest to highest)")
    for name, found in results.items():
        chance = statistics.mean(m["scenes/pointing/chance"] for m in found)
        table.add_row(name, *(_cell(found, metric) for metric in COLUMNS.values()), f"{chance:.1f}")
    return table


def _cell(found: list[dict[str, float]], metric: str) -> str:
    values = [m[metric] for m in found]
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def markdown(results: Results, options: argparse.Namespace) -> str:
    """The same as Markdown, with R@1 by caption length below."""
    lines = [
        f"{options.seeds} seed(s), {options.samples:,} images each; mean (lowest to highest); R@1 in %.",
        "",
        "| recipe | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(_cell(found, metric) for metric in COLUMNS.values()) + " |"
            for name, found in results.items()
        ),
        "",
        "Pointing by chance: "
        + f"{statistics.mean(m['scenes/pointing/chance'] for found in results.values() for m in found):.1f}.",
        "",
        "R@1, mean of both directions, with the caption cut to so many tokens:",
        "",
    ]
    curves = {name: _means([length_curves(m)["scenes"] for m in found]) for name, found in results.items()}
    lengths = list(next(iter(curves.values())))
    lines += ["| recipe | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{curve[length]:.1f}" for length in lengths) + " |"
        for name, curve in curves.items()
    ]
    return "\n".join(lines) + "\n"


def _means(curves: list[dict[int, float]]) -> dict[int, float]:
    return {length: statistics.mean(curve[length] for curve in curves) for length in curves[0]}


def _spreads(curves: list[dict[int, float]]) -> dict[int, float]:
    """Half the distance from the lowest to the highest seed."""
    return {
        length: (max(c[length] for c in curves) - min(c[length] for c in curves)) / 2 for length in curves[0]
    }


if __name__ == "__main__":
    main()
