"""What is known about a model beyond its weights: where it comes from, how it was trained and judged.

In: what the user named. Out: `Known`, for the provenance in configurations and for the model card. Results
are those of exactly these weights: a judgement at the checkpoint's own step, and lines of results.jsonl that
carry the same fingerprint. Paths and addresses are shortened to what strangers may read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .. import __version__, ema, models, runs
from ..stored import Stored
from ..towers.pretrained import Backbone
from .openclip import CONFIG

log = logging.getLogger(__name__)


class Result(NamedTuple):
    """One number, in the words of whoever judged."""

    benchmark: str
    protocol: str  # "" for data of one's own
    name: str
    value: float


class Known(NamedTuple):
    """All of it; what nobody knows is empty."""

    name: str
    provenance: dict[str, Any]
    config: dict[str, Any]  # the run's config.yaml
    results: list[Result]


def gather(source: str, backbone: Backbone, dtype: str, weights: str | None = None) -> Known:
    """What the folders around `source` say about the model that was loaded from it, with these `weights`."""
    fingerprint = models.fingerprint(backbone)
    general = {"longclip": __version__, "source": public(source), "fingerprint": fingerprint, "dtype": dtype}
    path = Path(source).expanduser()
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        return _of_checkpoint(models.checkpoint_of(path), weights, general)
    before = _provenance(path / CONFIG)
    results = list(_judged(path / "eval" / "results.jsonl", fingerprint))
    return Known(path.name or source, {**before, **general}, {}, results)


def _of_checkpoint(checkpoint: Path, weights: str | None, general: dict[str, Any]) -> Known:
    stored = Stored(checkpoint)
    averaged = any(name.startswith(f"{ema.KIND}/") for name in stored.shapes)
    run = checkpoint.resolve().parent.parent
    config = _config(run / "config.yaml")
    provenance = {
        **general,
        "weights": weights or _default(averaged),
        "run": run.name,
        "checkpoint": checkpoint.name,
        "step": stored.values["global_step"],
        "samples_seen": stored.values["longclip"]["samples_seen"],
    }
    results = list(_judged(run / "eval" / "results.jsonl", provenance["fingerprint"]))
    if provenance["weights"] == (config.get("weights") or _default(averaged)):  # what the run itself judged
        known = {(result.benchmark, result.name) for result in results}
        own = _while_training(run, provenance["samples_seen"])
        results = [result for result in own if (result.benchmark, result.name) not in known] + results
    return Known(run.name, provenance, config, results)


def _default(averaged: bool) -> str:
    return ema.KIND if averaged else "raw"


def _while_training(run: Path, seen: int) -> Iterator[Result]:
    """The run's own judgement at this very checkpoint."""
    rows = [row for row in runs.judgements(run) if row["samples_seen"] == seen]
    for name, value in rows[-1].items() if rows else ():
        benchmark, slash, number = name.partition("/")
        if slash:
            yield Result(benchmark, "", number, float(value))


def _judged(path: Path, weights: str) -> Iterator[Result]:
    """Of every benchmark the newest line that judged these weights; a torn line is left out."""
    newest: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: a torn line was passed over", path)
            continue
        if row.get("weights") == weights:
            newest[row["benchmark"]] = row
    for benchmark, row in newest.items():
        for name, value in row["numbers"].items():
            yield Result(benchmark, row.get("protocol", ""), name, float(value))


def _provenance(path: Path) -> dict[str, Any]:
    """What an export says about itself."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("longclip")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return public(found) if isinstance(found, dict) else {}


def public(value: Any) -> Any:
    """The same without folders of this machine, and without what addresses say beyond a host and a path."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return re.sub(r"://[^/@]*@", "://", value).split("?")[0]
    return Path(value).name if value.startswith(("/", "~")) else value
