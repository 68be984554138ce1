"""What judging leaves behind, so that results can be compared later and by others.

    FOLDER/results.jsonl     append-only: one line for every benchmark of every judging
    FOLDER/details.json      the newest of each benchmark, with what every number is the mean of
    FOLDER/metrics.json      its numbers as flat name -> value, and as CLIP_benchmark names them
    FOLDER/table.md          the same as Markdown

In: `Findings` and facts about the judging. Out: these files; `load` reads them again. What was found with
other weights stays in results.jsonl and nowhere else: the rest speaks of one model.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import longclip
from longclip.evaluate import Each, Findings, flat
from longclip.types import UserError

from .report import markdown

log = logging.getLogger(__name__)

DETAILS = "details.json"
_FOUND = {"i2t": "text_retrieval", "t2i": "image_retrieval"}  # named by what is found, not by what is asked
_THEIRS = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}


@dataclass(frozen=True)
class Facts:
    """What a result says beyond its numbers.

    Attributes:
        model: what was judged, as the user named it.
        weights: its `models.fingerprint`.
        context_length: tokens that it reads.
        settings: benchmark -> the plain config that it was built from.
        seconds: benchmark -> how long it took.
    """

    model: str
    weights: str
    context_length: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One benchmark's numbers for one model, and what made them."""

    benchmark: str
    protocol: str
    model: str
    weights: str
    context_length: int
    numbers: Mapping[str, float]
    settings: Any
    seconds: float | None
    when: str  # UTC
    version: str  # of longclip
    each: Mapping[str, Each] = field(default_factory=dict)


def write(folder: Path, findings: Mapping[str, Findings], facts: Facts) -> dict[str, Result]:
    """Add findings to a folder; returns all that is known there of these weights, by benchmark."""
    found = {name: _result(name, findings[name], facts) for name in findings}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.jsonl", "a", encoding="utf-8") as lines:  # first: nothing here can lose them
        lines.writelines(_line(result) + "\n" for result in found.values())
    results = {name: old for name, old in _kept(folder).items() if old.weights == facts.weights} | found
    _replace(folder / DETAILS, json.dumps({name: _detailed(result) for name, result in results.items()}))
    numbers = flat(results)
    _replace(folder / "metrics.json", json.dumps(numbers | clip_benchmark(numbers), indent=1) + "\n")
    _replace(folder / "table.md", markdown(numbers, _labels(results, facts)))
    return results


def clip_benchmark(numbers: Mapping[str, float]) -> dict[str, float]:
    """Retrieval and classification under CLIP_benchmark's names, as shares of one.

    >>> clip_benchmark({"coco/long/t2i_r5": 62.5, "coco/long/t2i_median": 3.0, "cifar10/top1": 50.0})
    {'coco/long/image_retrieval_recall@5': 0.625, 'cifar10/acc1': 0.5}
    """
    theirs = {}
    for name, value in numbers.items():
        place, slash, own = name.rpartition("/")
        found = re.fullmatch(r"(i2t|t2i)_r(\d+)", own)
        named = f"{_FOUND[found[1]]}_recall@{found[2]}" if found else _THEIRS.get(own)
        if named:
            theirs[place + slash + named] = value / 100
    return theirs


def load(folder: Path) -> dict[str, Result]:
    """The newest result of every benchmark in a folder.

    Raises:
        UserError: the file there cannot be read.
    """
    path = folder / DETAILS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: _restored(fields) for name, fields in content.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it and judge again with python -m eval.run"
        ) from error


def find(name: str) -> Path:
    """The folder of results that a user means: itself, or that of a model.

    Raises:
        UserError: there are no results.
    """
    places = [Path(name), folder_of(name)]
    for place in places:
        if (place / DETAILS).is_file():
            return place
    looked = " and ".join(str(place / DETAILS) for place in dict.fromkeys(places))
    raise UserError(
        f"{name} has no results to compare (looked for {looked}): python -m eval.run model={name}"
    )


def folder_of(model: str) -> Path:
    """Where a model's results lie: beside a run or an export, else below runs/eval."""
    path = Path(model.removeprefix("local-dir:"))
    if path.is_dir() and path.suffix != ".ckpt":  # a checkpoint is a folder that nobody else writes to
        return path / "eval"
    return Path("runs/eval") / (re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model")


def _kept(folder: Path) -> dict[str, Result]:
    """What `load` finds; a file that it cannot read is moved aside, so that judging goes on without it."""
    path = folder / DETAILS
    if not path.exists():
        return {}
    try:
        return load(folder)
    except UserError as error:
        aside = path.with_name(f"{DETAILS}.unreadable")
        os.replace(path, aside)
        log.warning("%s cannot be read (%s): moved to %s, and begun anew", path, error.__cause__, aside)
        return {}


def _result(name: str, findings: Findings, facts: Facts) -> Result:
    return Result(
        benchmark=name,
        protocol=findings.protocol,
        model=facts.model,
        weights=facts.weights,
        context_length=facts.context_length,
        numbers=dict(findings.numbers),
        settings=facts.settings.get(name),
        seconds=facts.seconds.get(name),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        version=longclip.__version__,
        each=findings.each,
    )


def _labels(results: Mapping[str, Result], facts: Facts) -> dict[str, str]:
    protocols = dict.fromkeys(result.protocol for result in results.values() if result.protocol)
    return {
        "model": facts.model,
        "weights": facts.weights,
        "context": f"{facts.context_length} tokens",
        "protocols": ", ".join(protocols) or "none (data of one's own)",
    }


def _line(result: Result) -> str:
    fields = asdict(replace(result, each={}))
    del fields["each"]
    return json.dumps(fields)


def _detailed(result: Result) -> dict[str, Any]:
    """All of a result; keys that several numbers share are written once."""
    lists: list[list[str]] = []
    places: dict[tuple[str, ...], int] = {}
    each = {}
    for name, (keys, values) in result.each.items():
        place = places.setdefault(tuple(keys), len(lists))
        if place == len(lists):
            lists.append(list(keys))
        each[name] = {"keys": place, "values": [round(float(value), 6) for value in values]}
    return {**json.loads(_line(result)), "keys": lists, "each": each}


def _restored(fields: dict[str, Any]) -> Result:
    lists = fields.pop("keys")
    each = {name: Each(lists[one["keys"]], one["values"]) for name, one in fields.pop("each").items()}
    return Result(**fields, each=each)


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
