"""Tokenise a long caption and its eight sentences: ours against open_clip's tokenizer, on one core.

open_clip's gets nine strings and makes a padded table; ours makes packed tokens. On line, ours gets the
same nine strings, or the eight sentences alone, since their ids together are those of the long caption. From
shards, it gets the bytes of the `ids` member and the number of ids of each sentence. Splitting into
sentences and reading JSON are on neither side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer

from longclip.tokens import Packed, Tokenizer, joined, pack, stored, unpack
from longclip.types import Ids, Text

from .data_synthetic import captions
from .measures import Row, at_most, faster, rates

CONTEXT = 248
CHUNK = 32  # images of a batch to pack: takes about as long as open_clip needs for one

Stored = tuple[bytes, list[int]]
Work = tuple[Callable[[Any], Any], Sequence[Any]]
"""What is timed, and on what, one after the other."""


def rows(quick: bool, folder: Path) -> list[Row]:
    theirs, tokenizer = SimpleTokenizer(), Tokenizer(SimpleTokenizer(), CONTEXT)
    said = list(captions(CHUNK * (1 if quick else 8)))
    kept = [_stored(sentences, tokenizer) for sentences in said]
    ways: dict[str, Work] = {
        "nine": (lambda eight: [Text(ids) for ids in _ids(_nine(eight), tokenizer)], said),
        "once": (lambda eight: _joined(_ids(eight, tokenizer)), said),
        "shards": (lambda sample: _joined(stored(sample[0], sample[1], tokenizer)), kept),
    }
    jobs: dict[str, Work] = {"open_clip": (lambda eight: theirs(_nine(eight), CONTEXT), said)}
    for name, (texts, samples) in ways.items():
        jobs[name] = (partial(_packed, texts=texts, tokenizer=tokenizer), _chunks(samples))
    found = rates(jobs, rounds=2 if quick else 20)
    base = found["open_clip"]
    what = "long caption + 8 sentences, {}, images/s on one core"
    return [
        faster("P10.nine", what.format("nine strings on line"), CHUNK * found["nine"], base, 2),
        faster("P10.once", what.format("tokenised once on line"), CHUNK * found["once"], base, 5),
        faster("P10.shards", what.format("from shards"), CHUNK * found["shards"], base, 100, limit="343x"),
        at_most("P10.ids", "images whose ids differ from open_clip's", _different(jobs, ways), 0),
    ]


def _packed(chunk: Sequence[Any], texts: Callable[[Any], list[Text]], tokenizer: Tokenizer) -> Packed:
    return pack([texts(sample) for sample in chunk], tokenizer)


def _chunks(samples: Sequence[Any]) -> list[Sequence[Any]]:
    return [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]


def _nine(sentences: list[str]) -> list[str]:
    return [" ".join(sentences), *sentences]


def _ids(texts: list[str], tokenizer: Tokenizer) -> list[Ids]:
    return [tokenizer.ids(tokenizer.clean(text)) for text in texts]


def _joined(sentences: list[Ids]) -> list[Text]:
    """The long caption and its sentences."""
    return [Text(joined(sentences)), *map(Text, sentences)]


def _stored(sentences: list[str], tokenizer: Tokenizer) -> Stored:
    """What `data.shards` writes."""
    ids = _ids(sentences, tokenizer)
    return np.fromiter(chain.from_iterable(ids), "<u2").tobytes(), [len(part) for part in ids]


def _different(jobs: Mapping[str, Work], ours: Iterable[str]) -> int:
    """Images for which one of our ways gives other ids than open_clip's."""
    job, said = jobs["open_clip"]
    expected_SL, different = torch.cat([job(eight) for eight in said]), 0
    for name in ours:
        job, chunks = jobs[name]
        tables = [unpack(p.tokens_T, p.lengths_BK.flatten(), CONTEXT) for p in map(job, chunks)]
        differs_S = (torch.cat(tables) != expected_SL).any(1)
        different += int(differs_S.view(len(said), -1).any(1).sum())
    return different
