"""Convert a data set into shards: read, check, split into sentences, tokenise, write; nothing silent.

In: a `Source`. Out: `OUT/SPLIT/NNNNNN.tar` with an index each, `OUT/errors.jsonl` with everything that was
left out and why, and a `ConversionReport`. The bytes depend on the source and the arguments alone: not on
the number of workers, nor on how often the conversion was killed and begun again.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from ...tokens import Tokenizer
from ...types import UserError
from ..tars.keys import Keys
from ..tars.shards import Writer, WriteReport
from .journal import NAME, Journal, resume
from .layouts.source import Entry, Fault, Source
from .prepare import Prepare, Prepared
from .workers import ordered_map

JUDGED_AFTER = 1000  # entries seen before their share of faults may stop a conversion half-way
MOST_SPLITS = 32  # more are a mistake: a field that is no split


class ConversionReport(NamedTuple):
    """What was written, what was left out, and how long the captions are."""

    splits: dict[str, WriteReport]
    faults: dict[str, int]  # entries and captions left out by reason, most frequent first
    notes: dict[str, int]  # peculiarities of what was kept, likewise
    lengths: dict[int, int]  # captions by tokens, start and end token included, shortest first

    def share_over(self, tokens: int) -> float:
        """Share of captions that a context of so many tokens cuts."""
        over = sum(n for length, n in self.lengths.items() if length > tokens)
        return over / max(1, sum(self.lengths.values()))

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
        lines += [f"note: {count:,} x {reason}" for reason, count in self.notes.items()]
        return "\n".join(lines)


class Step(NamedTuple):
    """How far a conversion is."""

    done: float  # share of the source
    images: int
    left_out: int  # entries


def convert(
    source: Source,
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    samples_per_shard: int = 1000,
    splitter: str = "syntok",
    max_faults: float = 0.01,
    workers: int = 1,
    progress: Callable[[Step], None] | None = None,
) -> ConversionReport:
    """Convert a source into one folder of shards per split; go on where an interrupted conversion stopped.

    Args:
        out: made if missing.
        tokenizer: makes the ids that are stored.
        samples_per_shard: of every shard but the last.
        splitter: what finds sentences (`sentences.split`).
        max_faults: entries that may be left out, as a share of all.
        workers: processes that decode, check, split and tokenise.
        progress: called after every entry.

    Raises:
        UserError: `out` holds finished shards or another conversion; too many faults; nothing to write.
            The folders then stay UNFINISHED and cannot be read; converting again goes on.
    """
    out, job = Path(out), Prepare(tokenizer, splitter)
    out.mkdir(parents=True, exist_ok=True)
    identity = source.identity() | {
        "--samples-per-shard": str(samples_per_shard),
        "--splitter": splitter,
        "tokenizer (--model)": tokenizer.name_hash,
    }
    journal = resume(out, identity)
    with _room(out), ExitStack() as stack:
        writing = _Writing(out, journal, stack, samples_per_shard, max_faults)
        for entry, found in ordered_map(job, writing.wanted(source), workers):
            writing.take(entry, found)
            if progress:
                progress(Step(source.done, journal.images, journal.left_out))
        writing.finish(source)
    (out / NAME).unlink()
    return writing.report()


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """A full disk is said in a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {out} is full ({error.strerror}); make room and run the same command again: "
            "finished shards are kept"
        ) from error


class _Writing:
    """The writing side of a conversion: splits, keys, faults, and the journal of it all."""

    def __init__(
        self, out: Path, journal: Journal, stack: ExitStack, samples_per_shard: int, max_faults: float
    ) -> None:
        self.out, self.journal, self.stack, self.max_faults = out, journal, stack, max_faults
        self.samples_per_shard = samples_per_shard
        self.keys = Keys(out / "keys.partial")
        stack.callback(self.keys.close)
        self.images = Keys(out / "images.partial")  # by key the image that has it first, kept or not
        stack.callback(self.images.close)
        self.errors = stack.enter_context((out / "errors.jsonl").open("ab"))
        self.errors.seek(self.errors.truncate(journal.errors))
        # Entries to make again, of shards that were open: no longer counted, their captions are.
        self._before = journal.seen
        self._again = {number for numbers in journal.open.values() for number in numbers}
        journal.open = {}
        self.splits: dict[str, Writer] = {}
        for split in journal.shards:  # their keys must be known before another split writes
            self._writer(split)

    def wanted(self, source: Source) -> Iterator[Entry | Fault]:
        """The entries that are not in finished shards, and not counted as faults before."""
        for entry in source:
            if isinstance(entry, Entry):
                self.images.add(entry.key, _image(entry))
            if entry.number > self._before or entry.number in self._again:
                yield entry

    def take(self, entry: Entry | Fault, found: Prepared | Fault) -> None:
        """Write or count one entry; they come in order."""
        again = entry.number <= self._before
        if not again:
            self.journal.seen = entry.number
        if isinstance(found, Fault) or isinstance(entry, Fault):
            assert isinstance(found, Fault), "faults pass through"
            self._leave_out(found, again)
        elif found.record.key in self.keys:
            detail = (
                f"{self.images.note(entry.key)} and {_image(entry)} have one key: rename one of them, or, "
                "if they are one image, put all its captions into one entry"
            )
            self._leave_out(Fault(entry.number, entry.where, entry.key, "key comes twice", detail), again)
        else:
            if not again:
                self._count(found)
            self._write(entry, found)

    def finish(self, source: Source) -> None:
        """Judge the faults, and let the writers close; a kill from here on is mended as any other."""
        self._check_share(self.journal.seen)
        if not self.splits:
            raise UserError(
                f"{source.source} has no entry that can be used, {self.journal.left_out} were left out; "
                f"see {self.errors.name}"
            )
        self._save()

    def report(self) -> ConversionReport:
        return ConversionReport(
            {split: writer.report for split, writer in self.splits.items()},
            dict(self.journal.reasons.most_common()),
            dict(self.journal.notes.most_common()),
            dict(sorted(self.journal.lengths.items())),
        )

    def _count(self, found: Prepared) -> None:
        self.journal.images += 1
        self.journal.lengths.update(found.tokens)
        self.journal.notes.update(found.notes)
        for fault in found.lost:
            self._log(fault, "caption")

    def _leave_out(self, fault: Fault, again: bool) -> None:
        if again:
            raise UserError(
                f"{fault.where} could be used before this conversion was interrupted, and no more: "
                f"{fault.reason} ({fault.detail}); put it back, or remove {self.out} and begin anew"
            )
        self.journal.left_out += 1
        self._log(fault, "entry")
        if self.journal.seen >= JUDGED_AFTER:
            self._check_share(self.journal.seen)

    def _log(self, fault: Fault, lost: str) -> None:
        self.journal.reasons[fault.reason] += 1
        line = json.dumps(fault._asdict() | {"lost": lost}, ensure_ascii=False)
        self.errors.write(line.encode(errors="replace") + b"\n")  # names in a tar may be no UTF-8

    def _write(self, entry: Entry, found: Prepared) -> None:
        writer = self._writer(entry.split)
        before = writer.report.shards
        writer.add(found.record)
        self.journal.open.setdefault(entry.split, []).append(entry.number)
        if writer.report.shards > before:
            self.journal.open[entry.split] = []
            self.journal.shards[entry.split] = writer.report.shards
            self._save()

    def _writer(self, split: str) -> Writer:
        if split not in self.splits:
            if len(self.splits) == MOST_SPLITS:
                some = ", ".join([*self.splits][:3])
                raise UserError(
                    f"there are more than {MOST_SPLITS} splits ({some}, ..., {split}); "
                    "name another field under `split` in the layout"
                )
            kept = self.journal.shards.get(split, 0)
            writer = Writer(
                self.out / split,
                self.samples_per_shard,
                self.journal.identity["tokenizer (--model)"],
                keys=self.keys,
                kept=kept,
            )
            self.splits[split] = self.stack.enter_context(writer)
        return self.splits[split]

    def _save(self) -> None:
        self.errors.flush()
        self.journal.errors = self.errors.tell()
        self.journal.save(self.out)

    def _check_share(self, seen: int) -> None:
        left_out, reasons = self.journal.left_out, self.journal.reasons
        if left_out > self.max_faults * seen:
            most = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            share = min(1.0, 1.2 * left_out / seen)
            raise UserError(
                f"{left_out} of {seen} entries cannot be used, more than the {self.max_faults:.1%} allowed: "
                f"{most}. See {self.errors.name}; mend the source and remove {self.out} to begin anew, or "
                f"allow more with --max-faults {share:.2f} to go on"
            )


def _image(entry: Entry) -> str:
    """The name of its image, and where that is named; broken characters become "?"."""
    return f"{entry.meta['image']} ({entry.where})".encode(errors="replace").decode()
