"""A look at a source before anything is written: samples, caption lengths, faults, and how many shards.

In: the first entries of a `Source`. Out: a `Survey`, whose text is what `longclip shards` shows first.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import NamedTuple

from .layouts.source import Entry, Fault, Source
from .prepare import Prepare, Prepared
from .workers import ordered_map

LOOKED_AT = 1000  # entries
SHOWN = 3  # samples
EDGES = (20, 40, 77, 120, 180, 248, 400)  # of the histogram, in tokens
GOOD_SHARD = 250e6  # bytes: 100 to 500 MB each is typical
BAR = 40  # characters


class Survey(NamedTuple):
    """The first entries of a source."""

    shown: list[tuple[Entry, Prepared]]
    seen: int
    images: int
    bytes: int  # of the images
    total: int  # entries of the whole source, estimated
    lengths: Counter[int]  # captions by tokens, start and end token included
    sources: dict[str, int]  # captions by who wrote them; 0 where the layout names one that none has
    faults: dict[str, tuple[int, str]]  # by reason: entries and captions left out, and one of them
    notes: Counter[str]


def survey(source: Source, job: Prepare, workers: int = 1, limit: int = LOOKED_AT) -> Survey:
    """Look at the first `limit` entries, as a conversion would make them."""
    shown: list[tuple[Entry, Prepared]] = []
    seen = images = size = 0
    lengths, notes = Counter[int](), Counter[str]()
    sources = {rule.source: 0 for rule in source.layout.captions}
    faults: dict[str, tuple[int, str]] = {}
    for entry, found in ordered_map(job, islice(source, limit), workers):
        seen += 1
        for fault in [found] if isinstance(found, Fault) else found.lost:
            count, example = faults.get(fault.reason, (0, f"{fault.where}: {fault.detail}"))
            faults[fault.reason] = count + 1, example
        if isinstance(found, Fault) or isinstance(entry, Fault):
            continue
        images, size = images + 1, size + len(found.record.image)
        lengths.update(found.tokens)
        notes.update(found.notes)
        for caption in found.record.captions:
            sources[caption.source] = sources.get(caption.source, 0) + 1
        if len(shown) < SHOWN:
            shown.append((entry, found))
    total = seen if seen < limit else round(seen / max(source.done, 1e-9))
    return Survey(shown, seen, images, size, total, lengths, sources, faults, notes)


def describe(found: Survey, samples_per_shard: int) -> str:
    """What a user should see before hours of conversion."""
    lines = [line for entry, prepared in found.shown for line in _sample(entry, prepared)]
    lines += ["", f"the first {found.seen:,} entries: {found.images:,} images can be used", ""]
    lines += _histogram(found.lengths)
    lines += [_source(name, count, found) for name, count in found.sources.items()]
    lines += [f"left out: {n:,} x {reason}, such as {such}" for reason, (n, such) in found.faults.items()]
    lines += [f"note: {count:,} x {note}" for note, count in found.notes.most_common()]
    return "\n".join([*lines, "", *_advice(found, samples_per_shard), ""])


def _sample(entry: Entry, prepared: Prepared) -> list[str]:
    record = prepared.record
    lines = [
        "",
        f"{entry.where} -> {entry.split}/{record.key}.{record.extension}, {len(record.image) / 1e3:,.1f} kB",
    ]
    for caption, tokens in zip(record.captions, prepared.tokens, strict=True):
        lines.append(f"  {caption.source}: {tokens} tokens, {len(caption.sentences)} sentences")
        for sentence in caption.sentences:
            lines.append(f"  {len(sentence.ids):5d}  {caption.text[sentence.start : sentence.end][:160]}")
    return lines


def _histogram(lengths: Counter[int]) -> list[str]:
    captions = lengths.total()
    if not captions:
        return []
    lines = ["tokens of a caption"]
    for low, high in zip((0, *EDGES), (*EDGES, None), strict=True):
        count = sum(n for length, n in lengths.items() if low < length and (high is None or length <= high))
        name = f"{low + 1}-{high}" if high else f"over {low}"
        lines.append(f"{name:>9} {count:8,}  {'#' * round(BAR * count / captions)}")
    over = [(sum(n for length, n in lengths.items() if length > c) / captions, c) for c in (77, 248)]
    shares = ", ".join(f"{share:.1%} over {context}" for share, context in over)
    return [*lines, f"{captions:,} captions: {shares} tokens, longest {max(lengths)}", ""]


def _source(name: str, count: int, found: Survey) -> str:
    if count:
        return f"captions of {name}: {count:,}"
    return f"captions of {name}: NONE in {found.seen:,} entries; is the field named so in the layout?"


def _advice(found: Survey, samples_per_shard: int) -> list[str]:
    if not found.images:
        return ["nothing here can be used"]
    mean = found.bytes / found.images + 2000 + 6 * sum(n * c for n, c in found.lengths.items()) / found.images
    images = max(1, round(found.total * found.images / found.seen))
    shards, best = -(-images // samples_per_shard), max(1, round(GOOD_SHARD / mean / 100) * 100)
    lines = [
        f"about {images:,} images, {images * mean / 1e6:,.0f} MB: {shards:,} shards of "
        f"{min(images, samples_per_shard):,}, {min(images, samples_per_shard) * mean / 1e6:,.1f} MB each"
    ]
    if images > best and not 100e6 <= samples_per_shard * mean <= 500e6:
        lines.append(
            f"advice: --samples-per-shard {best} makes {-(-images // best):,} shards of "
            f"{best * mean / 1e6:,.0f} MB (100 to 500 MB is typical)"
        )
    lines.append(
        f"readers other than longclip want at least as many shards as ranks x workers: for 64, "
        f"--samples-per-shard {max(1, images // 64)} or less"
    )
    return lines
