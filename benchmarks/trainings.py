"""Trainings in processes of their own, side by side: run what is missing, collect what was judged, tell it.

In: run directories, overrides of train.py. Out: flat names -> numbers for every seed, and their means.
A run that is finished is left alone and an unfinished one goes on, so that a benchmark may be stopped and
started again; one that fails is named and the others go on without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from eval.report import length_curves
from longclip import runs
from longclip.data.converting.workers import processors
from longclip.data.plans.plan import BY_RULE

Numbers = dict[str, float]

Found = dict[str, dict[int, Numbers]]
"""Variant -> seed -> what its run was judged to be."""


UNTOLD = ("_queries", "_median", "_r5", "tokens", "tokens_max", "truncated")
"""Ends of the names of numbers that are of data, or that no table tells."""


class Job(NamedTuple):
    """One training."""

    variant: str
    seed: int
    run: Path
    overrides: Sequence[str]
    samples: int
    first: Job | None = None  # what it goes on from


def options_parser(doc: str | None) -> argparse.ArgumentParser:
    """What every comparison of trainings can be told; `doc` is that of its module."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--sidecars", nargs="+", default=[], metavar="RECIPE=STORE", help="for those that read")
    add("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="of train.py, for all")
    add("--own", nargs="+", default=[], metavar="RECIPE:KEY=VALUE", help="of train.py, for one")
    add("--jobs", type=int, default=1, help="trainings at once, each on its share of cores")
    add("--report", action="store_true", help="train nothing, show what there is")
    add("--out", type=Path, default=Path("docs"))
    add("--markdown", type=Path, default=Path("docs/results.md"), help="has marks")
    return parser


def run_all(jobs: Sequence[Job], at_once: int) -> Found:
    """Train whatever is not there yet, each job on its share of the processors."""
    threads = max(processors() // at_once, 1)
    with ThreadPoolExecutor(at_once) as pool:
        done = list(pool.map(lambda job: _attempt(job, threads), jobs))
    for job, whole in zip(jobs, done, strict=True):
        if not whole:
            print(f"{job.run} failed: {job.run}.log says why", flush=True)
    return collect(jobs)


def collect(jobs: Sequence[Job]) -> Found:
    """The last judgement of every job that is finished, without what no table tells."""
    found: Found = {}
    for job in jobs:
        if finished(job.run, job.samples):
            judged = runs.judgements(job.run)[-1].items()
            told = {name: number for name, number in judged if not name.endswith(UNTOLD)}
            found.setdefault(job.variant, {})[job.seed] = told
    return found


def _attempt(job: Job, threads: int) -> bool:
    try:
        for one in (job.first, job):
            if one is not None:
                train(one.run, [*one.overrides, f"seed={one.seed}"], one.samples, threads)
    except subprocess.CalledProcessError:
        return False
    return True


def equipped(
    variants: Mapping[str, Sequence[str]], sidecars: Sequence[str], own: Sequence[str]
) -> dict[str, list[str]]:
    """Variants that can train, with side-cars (NAME=STORE) and overrides (NAME:KEY=VALUE) of their own."""
    import hydra

    from conf.launch import CONF

    stores, found = dict(pair.split("=", 1) for pair in sidecars), dict[str, list[str]]()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name, overrides in variants.items():
            data = hydra.compose("train", list(overrides)).data
            columns = [*data.sidecar.columns, *({data.plan.batches} - set(BY_RULE))]
            if columns and name not in stores:
                print(f"{name} is left out: it reads {', '.join(columns)} (--sidecars {name}=STORE)")
            else:
                store = [f"data.sidecar.stores=[{stores[name]}]"] if name in stores else []
                mine = [one.removeprefix(f"{name}:") for one in own if one.startswith(f"{name}:")]
                found[name] = [*overrides, *store, *mine]
    return found


def train(run: Path, overrides: Sequence[str], samples: int, threads: int) -> None:
    """`python train.py`; what it says goes into RUN.log. Raises CalledProcessError where it fails."""
    if finished(run, samples):
        return
    started = time.monotonic()
    command = [sys.executable, "train.py", f"samples={samples}", "export=null", "resume=auto", *overrides]
    command += [f"runs={run.parent}", f"name={run.name}"]
    command += ["data.workers=0"] if threads == 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    print(f"{run}: {time.monotonic() - started:.0f} s", flush=True)


def finished(run: Path, samples: int) -> bool:
    """Whether a run was judged at its end."""
    found = runs.judgements(run)
    return bool(found) and found[-1]["samples_seen"] >= samples * 0.98  # whole batches only


def directory(variant: str) -> str:
    """A variant's name as a folder's."""
    return variant.replace(",", "").replace(" ", "-")


def cell(
    seeds: Mapping[int, Numbers], names: str | Sequence[str], least: Mapping[str, float] | None = None
) -> str:
    """Mean over seeds (lowest to highest) of a number, or of the mean of several; "-" where there is none.

    With `least`, what it is above those numbers.
    """
    names = [names] if isinstance(names, str) else names
    values = means(seeds, names)
    if not values:
        return "-"
    if least:
        values = [value - statistics.mean(least[name] for name in names) for value in values]
    signed = "+.1f" if least else ".1f"
    middle = f"{statistics.mean(values):{signed}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{signed}} to {max(values):{signed}})"


def means(seeds: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> list[float]:
    """Of every seed that has all these numbers, their mean."""
    return [
        statistics.mean(numbers[name] for name in names)
        for numbers in seeds.values()
        if all(name in numbers for name in names)
    ]


class Curve(NamedTuple):
    """R@1, mean of both directions, by the tokens that a caption is cut to."""

    mean: dict[int, float]
    spread: dict[int, float]  # half the distance from the lowest to the highest seed


def curve(seeds: Mapping[int, Numbers], benchmark: str) -> Curve:
    """Over seeds."""
    found = [length_curves(numbers)[benchmark] for numbers in seeds.values()]
    return Curve(
        {length: statistics.mean(one[length] for one in found) for length in found[0]},
        {length: (max(o[length] for o in found) - min(o[length] for o in found)) / 2 for length in found[0]},
    )
