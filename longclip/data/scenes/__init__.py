"""The embedded data: rendered scenes, each with a long caption and the box of every sentence.

In: a seed. Out: shards under one root, written as users' data is, in three splits:

    train, heldout   independent scenes
    distractors      groups of four scenes that differ in one attribute of one thing, which only the last
                     sentence tells, after more than 77 tokens (`meta["group"]` says which belong together)

A scene is a pure function of (seed, split, index), so the number of processes changes nothing.
`facts` composes, `render` draws, `text` tells. To see some:

    python -m longclip.data.scenes --picture scenes.png
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import simplejpeg

from longclip.data.converting.workers import processors
from longclip.data.scenes.render import render
from longclip.data.scenes.text import GROUP, Told, tell
from longclip.data.tars import shards
from longclip.tokens import Tokenizer
from longclip.types import Caption, Record, Sentence, UserError

VERSION = 6
"""Goes up whenever the same parameters would give other scenes."""

_SMALLEST = 16  # pixels; below, things are specks
_CHUNK = 100  # scenes in a task


class Parameters(NamedTuple):
    """What the scenes under a root depend on, as its scenes.json tells."""

    train: int
    heldout: int
    groups: int
    size: int
    seed: int
    version: int
    tokenizer: str


def make(
    root: str | Path,
    train: int = 12_000,
    heldout: int = 500,
    groups: int = 100,
    size: int = 72,
    seed: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write the splits that have scenes, unless they are there, and return their directories.

    `tokenizer` defaults to CLIP's; `processes` to the processors this process may use; `progress` is
    called with (scenes made, scenes in all). The root appears whole or not at all.

    Raises UserError where the root holds something else, or scenes made with other parameters.
    """
    if size < _SMALLEST:
        raise UserError(
            f"Scenes of size={size} pixels are too small to see; size must be {_SMALLEST} or more."
        )
    root, tokenizer = Path(root), tokenizer or default_tokenizer()
    counts = {"train": train, "heldout": heldout, "distractors": groups * GROUP}
    paths = {split: root / split for split, count in counts.items() if count}
    wanted = Parameters(train, heldout, groups, size, seed, VERSION, tokenizer.name_hash)
    if _is_made(root, wanted):
        return paths
    root.parent.mkdir(parents=True, exist_ok=True)
    job = partial(_chunk, seed=seed, size=size, tokenizer=tokenizer)
    watch = _Watch(progress, sum(counts.values()))
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as building:
        whole = Path(building, "whole")
        with _workers(processes, job) as mapped:
            for split in paths:
                made = chain.from_iterable(mapped(_tasks(split, counts[split])))
                shards.write(watch(made), whole / split, tokenizer_hash=tokenizer.name_hash)
        (whole / "scenes.json").write_text(json.dumps(wanted._asdict(), indent=1))
        _publish(whole, root, wanted)
    return paths


def records(
    split: str, indices: Iterable[int], seed: int, size: int, tokenizer: Tokenizer
) -> Iterator[Record]:
    """Scenes of a split ("train", "heldout", "distractors" or any other name) as shard records."""
    for index in indices:
        scene, told, meta = tell(split, index, seed)
        image = simplejpeg.encode_jpeg(
            render(scene, size), quality=95, colorspace="RGB", colorsubsampling="444"
        )
        yield Record(f"{split}-{index:06d}", image, "jpg", (caption(told, tokenizer),), meta)


def caption(told: list[Told], tokenizer: Tokenizer) -> Caption:
    """Join sentences into a caption that keeps every sentence's span, ids and box."""
    sentences, start = [], 0
    for text, box in told:
        sentences.append(Sentence(start, start + len(text), tokenizer.ids(text), box))
        start += len(text) + 1
    return Caption("scene", " ".join(text for text, _ in told), tuple(sentences))


def default_tokenizer() -> Tokenizer:
    """CLIP's own byte-pair encoding, at the context length of long captions."""
    import open_clip

    return Tokenizer(open_clip.get_tokenizer("ViT-B-16", context_length=248), 248)


def _is_made(root: Path, wanted: Parameters) -> bool:
    """Whether the root holds these scenes; False where it is missing or empty.

    Raises UserError where it holds anything else.
    """
    manifest = root / "scenes.json"
    if not manifest.exists():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(
                f"{root} exists but holds no scenes (no scenes.json); choose another directory for them."
            )
        return False
    try:
        found = Parameters(**json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{manifest} does not list the parameters of scenes; remove {root} to make them anew."
        ) from error
    differing = [field for field in Parameters._fields if getattr(found, field) != getattr(wanted, field)]
    if differing:
        had, asked = (
            ", ".join(f"{key}={getattr(made, key)}" for key in differing) for made in (found, wanted)
        )
        raise UserError(
            f"The scenes in {root} were made with {had}, not {asked}; "
            "choose another directory, or remove this one."
        )
    return True


def _publish(whole: Path, root: Path, wanted: Parameters) -> None:
    """Move the finished directory into place; another process that was faster with the same scenes wins."""
    try:
        os.rename(whole, root)
    except OSError:
        if not _is_made(root, wanted):
            raise


Task = tuple[str, range]
"""A split, and which of its scenes one process makes at a time."""

Job = Callable[[Task], list[Record]]

_job: Job  # set in every worker when it starts, so that the tokenizer travels once


def _chunk(task: Task, seed: int, size: int, tokenizer: Tokenizer) -> list[Record]:
    split, indices = task
    return list(records(split, indices, seed, size, tokenizer))


def _tasks(split: str, count: int) -> list[Task]:
    return [(split, range(start, min(start + _CHUNK, count))) for start in range(0, count, _CHUNK)]


@contextmanager
def _workers(processes: int | None, job: Job) -> Iterator[Callable[[list[Task]], Iterator[list[Record]]]]:
    """A map of the job over tasks that keeps their order, on this many processes."""
    processes = processes or (processors() if sys.platform == "linux" else 1)
    if processes == 1:
        yield partial(map, job)
        return
    # Forked workers have everything imported and start at once; the job starts no threads and asks for none.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # Not multiprocessing.Pool: leaving it can wait for ever for a lock that a worker took along.
    with ProcessPoolExecutor(processes, context, _equip, (job,)) as pool:
        yield partial(pool.map, _work)


def _equip(job: Job) -> None:
    global _job
    _job = job


def _work(task: Task) -> list[Record]:
    return _job(task)


class _Watch:
    """Counts records over all splits as they pass by."""

    def __init__(self, report: Callable[[int, int], None] | None, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def __call__(self, passing: Iterable[Record]) -> Iterator[Record]:
        for record in passing:
            yield record
            self.done += 1
            if self.report and (self.done % _CHUNK == 0 or self.done == self.total):
                self.report(self.done, self.total)
