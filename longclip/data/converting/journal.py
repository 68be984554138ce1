"""How far a conversion has come, so that it goes on after a kill as if nothing had been.

`OUT/journal.json` is written after every finished shard and tells the state at the entry that finished it.
Shards that were open then are made again from the entries that were in them; all other entries before
that one are skipped. It goes when the conversion is complete.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...types import UserError
from ..tars.index import UNFINISHED, dump

VERSION = 1
NAME = "journal.json"


@dataclass
class Journal:
    """The state of a conversion behind the entry `seen`."""

    identity: dict[str, str]  # what the bytes of the shards depend on
    seen: int = 0  # entries, faults included
    left_out: int = 0  # entries
    images: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of entries and captions left out
    notes: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # captions by tokens
    errors: int = 0  # bytes of errors.jsonl
    shards: dict[str, int] = field(default_factory=dict)  # finished ones by split
    open: dict[str, list[int]] = field(
        default_factory=dict
    )  # numbers of the entries in open shards, by split

    def save(self, out: Path) -> None:
        """Write it, whole or not at all."""
        partial = out / f"{NAME}.partial"
        lengths = {str(length): count for length, count in self.lengths.items()}
        with open(partial, "wb") as file:
            file.write(dump({"version": VERSION} | self.__dict__ | {"lengths": lengths}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out / NAME)


def resume(out: Path, identity: Mapping[str, str]) -> Journal:
    """The journal of an interrupted conversion into `out`, an empty one if there is none.

    Raises:
        UserError: `out` holds finished shards, or an interrupted conversion of something else.
    """
    path = out / NAME
    if not path.exists():
        _refuse_finished(out)
        return Journal(dict(identity))
    values = _loaded(path)
    changed = [name for name, value in identity.items() if values["identity"].get(name) != value]
    if changed:
        name = changed[0]
        raise UserError(
            f"{out} holds an interrupted conversion with another {name} ({values['identity'].get(name)}, now "
            f"{identity[name]}); give the same arguments to go on, or remove {out} to begin anew"
        )
    for split in values["shards"] | values["open"]:  # a kill may have come while the splits were closed
        (out / split / UNFINISHED).touch()
    return Journal(**values)


def _loaded(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        if values.pop("version") != VERSION:
            raise ValueError("another version")
        for name in ("reasons", "notes"):
            values[name] = Counter(values[name])
        values["lengths"] = Counter({int(length): n for length, n in values["lengths"].items()})
        Journal(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no journal of a conversion ({error}); remove {path.parent} and begin anew"
        ) from error
    return values


def _refuse_finished(out: Path) -> None:
    """Before anything is written: another conversion's shards are not to be mixed with these."""
    finished = {path.parent for path in out.glob("*/*.index.json") if not (path.parent / UNFINISHED).exists()}
    if finished:
        names = ", ".join(sorted(path.name for path in finished))
        raise UserError(
            f"{out} already holds finished shards ({names}); choose another folder or remove them"
        )
