"""Convert a data set into shards: read, check, split into sentences, tokenise, write; nothing silent.

In: a source in a known layout. Out: `OUT/SPLIT/NNNNNN.tar` with an index each, `OUT/errors.jsonl` with
every entry that was left out and why, and a `ConversionReport`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..captions import parse
from ..tokens import Tokenizer
from ..types import Record, UserError
from . import images, layouts
from .index import UNFINISHED
from .layouts import Entry, Fault
from .shards import Writer, WriteReport

JUDGED_AFTER = 1000  # entries seen before their share of faults may stop a conversion half-way


class ConversionReport(NamedTuple):
    """What was written, what was left out, and how long the captions are."""

    splits: dict[str, WriteReport]
    faults: dict[str, int]  # by reason, most frequent first
    lengths: dict[int, int]  # captions by tokens, start and end token included, shortest first

    def share_over(self, tokens: int) -> float:
        """Share of captions that a context of so many tokens cuts."""
        return sum(n for length, n in self.lengths.items() if length > tokens) / max(
            1, sum(self.lengths.values())
        )

    def __str__(self) -> str:
        lines = [
            f"{split}: {done.samples:,} images with {done.captions:,} captions in {done.shards} shards, "
            f"{done.bytes / 1e6:,.1f} MB"
            for split, done in self.splits.items()
        ]
        if self.lengths:
            over = ", ".join(f"{self.share_over(n):.1%} over {n} tokens" for n in (77, 248))
            lines.append(f"captions: {over}, longest {max(self.lengths)}")
        lines += [f"left out: {count:,} x {reason}" for reason, count in self.faults.items()]
        return "\n".join(lines)


def convert(
    source: str | Path,
    layout: str,
    out: str | Path,
    samples_per_shard: int = 1000,
    splitter: str = "syntok",
    *,
    tokenizer: Tokenizer,
    max_fault_share: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> ConversionReport:
    """Convert a source into one folder of shards per split.

    Args:
        source: a folder or a tar.
        layout: how it is laid out (`layouts.LAYOUTS`).
        out: made if missing.
        samples_per_shard: of every shard but the last.
        splitter: what finds sentences (`captions.split`).
        tokenizer: makes the ids that are stored.
        max_fault_share: entries that may be left out, as a share of all.
        progress: called after every entry with the number of entries so far.

    Raises:
        UserError: `out` holds finished shards; too many faults; nothing to write. The folders then
            stay UNFINISHED and cannot be read; converting again starts them afresh.
    """
    out = Path(out)
    records = _records(layouts.read(source, layout), splitter, tokenizer)
    _refuse_finished(out)
    splits: dict[str, Writer] = {}
    faults, lengths, seen = Counter[str](), Counter[int](), 0
    with ExitStack() as stack:
        errors = stack.enter_context(open(out / "errors.jsonl", "w", encoding="utf-8"))
        for seen, (split, found) in enumerate(records, 1):
            if isinstance(found, Fault):
                faults[found.reason] += 1
                errors.write(json.dumps(found._asdict(), ensure_ascii=False) + "\n")
                if seen >= JUDGED_AFTER:
                    _check_share(faults, seen, max_fault_share, errors.name)
            else:
                if split not in splits:
                    writer = Writer(out / split, samples_per_shard, tokenizer.name_hash)
                    splits[split] = stack.enter_context(writer)
                splits[split].add(found)
                lengths.update(_lengths(found, tokenizer))
            if progress:
                progress(seen)
        _check_share(faults, seen, max_fault_share, errors.name)
        if not splits:
            raise UserError(
                f"{source} has no entry that can be used, {faults.total()} were left out; see {errors.name}"
            )
    reports = {split: writer.report for split, writer in splits.items()}
    return ConversionReport(reports, dict(faults.most_common()), dict(sorted(lengths.items())))


def _records(
    entries: Iterator[Entry | Fault], splitter: str, tokenizer: Tokenizer
) -> Iterator[tuple[str, Record | Fault]]:
    """(split, record) of every good entry; faults have the split ""."""
    seen: set[str] = set()
    for entry in entries:
        found = entry if isinstance(entry, Fault) else _record(entry, splitter, tokenizer)
        if isinstance(entry, Fault) or isinstance(found, Fault):
            yield "", found
        elif found.key in seen:
            yield "", Fault(found.key, "key comes twice", "put all captions of an image into one entry")
        else:
            seen.add(found.key)
            yield entry.split, found


def _record(entry: Entry, splitter: str, tokenizer: Tokenizer) -> Record | Fault:
    try:
        extension = images.extension(entry.image)
        images.decode(entry.image)
    except UserError as error:
        return Fault(entry.key, str(error).partition(":")[0], str(error))
    if not entry.captions:
        return Fault(entry.key, "no captions")
    try:
        captions = tuple(parse(text, source, tokenizer, splitter) for source, text in entry.captions)
    except UserError as error:
        return Fault(entry.key, "caption is empty", str(error))
    return Record(entry.key, entry.image, extension, captions, entry.meta)


def _lengths(record: Record, tokenizer: Tokenizer) -> Iterator[int]:
    ends = len(tokenizer.prefix) + len(tokenizer.suffix)
    for caption in record.captions:
        yield ends + sum(len(sentence.ids) for sentence in caption.sentences)


def _refuse_finished(out: Path) -> None:
    """Before anything is written: another conversion's shards are not to be mixed with these."""
    out.mkdir(parents=True, exist_ok=True)
    finished = {path.parent for path in out.glob("*/*.index.json") if not (path.parent / UNFINISHED).exists()}
    if finished:
        names = ", ".join(sorted(path.name for path in finished))
        raise UserError(
            f"{out} already holds finished shards ({names}); choose another folder or remove them"
        )


def _check_share(faults: Counter[str], seen: int, most: float, errors: str) -> None:
    if faults.total() > most * seen:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in faults.most_common(3))
        share = min(1.0, 1.2 * faults.total() / seen)
        raise UserError(
            f"{faults.total()} of {seen} entries cannot be used, more than the {most:.1%} allowed: "
            f"{reasons}. See {errors}; mend the source, or allow more with --max-faults {share:.2f}"
        )
