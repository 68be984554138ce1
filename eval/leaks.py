"""Has a model been trained on what it is judged on? Asked of every benchmark that knows its images by name.

In: findings, and the training data, as the run's config.yaml tells it or as the user names it. Out: the
findings with one number more, `overlap`, the percentage of their images that were trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import yaml

from eval.own import config_of
from longclip.data.corpus import sources
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.storage import within
from longclip.evaluate import Findings
from longclip.evaluate.overlap import overlap
from longclip.types import UserError

log = logging.getLogger(__name__)
NAMED = 3


def check(findings: Mapping[str, Findings], model: str, named: Dataset | None) -> dict[str, Findings]:
    """Add `overlap` where it can be told, and say where it is not 0.

    Args:
        model: what was judged; where it belongs to a run, that run's training data is asked.
        named: shards to ask instead.
    """
    sets = {name: next(iter(found.ranked.values())) for name, found in findings.items() if found.ranked}
    try:
        datasets = ([named] if named is not None else list(map(Dataset, trained_on(model)))) if sets else []
    except UserError as error:
        log.info("overlap with the training data is not known: %s", error)
        datasets = []
    if not datasets:
        return dict(findings)
    seen = overlap(sets, datasets)
    return {
        name: _told(name, found, len(sets[name].images), seen[name]) if name in sets else found
        for name, found in findings.items()
    }


def _told(name: str, found: Findings, images: int, seen: list[str]) -> Findings:
    share = 100 * len(seen) / images
    if seen:
        some = ", ".join(seen[:NAMED])
        log.warning(
            f"{name}: {len(seen)} of its {images} images ({share:.1f} %) were trained on, such as {some}: "
            "its numbers flatter this model"
        )
    return replace(found, numbers={**found.numbers, "overlap": share})


def trained_on(model: str) -> list[str]:
    """The folders of shards that the run behind a model has trained on, where there is such a run."""
    config = config_of(model)
    if config is None:
        return []
    try:
        data = yaml.safe_load(config.read_text())["data"]
        train = data.get("train")  # none where it was a stream of tars
        return [within(data["root"], one.folder) for one in sources(train).values()] if train else []
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{config} names no training data ({error})") from error
