"""A dataset joined with its side-cars: what is kept, how often it is shown, and what is added to a record.

In: a `Dataset`, and `data.sidecar` from YAML. Out: `Joined`, the records with what the side-cars know of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from ...types import Record, UserError
from ..plans.mixture import Shares
from ..tars.dataset import Dataset
from ..tars.retry import shown
from .store import Digests, Store, digests, find, label_of

RULES = "at_least, at_most, top, bottom, in"


@dataclass(frozen=True)
class Join:
    """What to do with side-cars.

    Args:
        stores: folders that `longclip sidecar` made. A column of captions adds them to the sample's own.
        filter: by column, what is kept: `{at_least: 0.28}`, `{at_most: 3}`, `{top: 0.5}` or `{bottom: 0.5}`
            (a share of the samples that have a value), `{in: FILE}` (a label, a number, or the sample's
            `key`: a text file of one a line, or .npy). Samples without a value are not kept.
        weight: column; samples are shown in proportion to it, see `mixture.Shares`.
        scores: column of vectors with a score for each stored caption, in stored order: `Caption.score`.
        columns: columns of numbers and vectors that batches carry along.
    """

    stores: Sequence[str] = ()
    filter: Mapping[str, Mapping[str, Any]] | None = None
    weight: str | None = None
    scores: str | None = None
    columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("stores", "columns"):
            if isinstance(getattr(self, name), str):
                raise UserError(
                    f"data.sidecar.{name} is one text; write it as a list: [{getattr(self, name)}]"
                )
        for column, rules in (self.filter or {}).items():
            if not isinstance(rules, Mapping) or not rules or set(rules) - set(RULES.split(", ")):
                raise UserError(
                    f"data.sidecar.filter has {column}: {rules!r}; write {column}: {{RULE: VALUE}} "
                    f"with a rule of {RULES}"
                )
            for rule, value in rules.items():
                if not isinstance(value, str if rule == "in" else int | float):
                    raise UserError(
                        f"data.sidecar.filter has {column}: {{{rule}: {value!r}}}; it is "
                        f"{'the path of a file' if rule == 'in' else 'a plain number, such as 0.3'}"
                    )


def carrying(join: Join, column: str | None) -> Join:
    """The same with one column more in every batch, where one is named."""
    known = column is None or column in join.columns
    return join if known else replace(join, columns=[*join.columns, str(column)])


class Joined:
    """A dataset with what side-cars know of its samples.

    Args:
        data: the dataset.
        join: what to join, keep and weigh.

    Attributes:
        kept: the samples to choose from, None for all.
        shares: see `mixture.Shares`, None where all are shown equally often.

    Raises:
        UserError: a side-car has none of the dataset's keys; a column does not exist or is of the wrong kind;
            nothing is kept.
    """

    def __init__(self, data: Dataset, join: Join) -> None:
        self.data, self.join = data, join
        self.stores = [Store(folder) for folder in join.stores]
        self.rows = [store.rows(self._digests) for store in self.stores]
        for store, rows in zip(self.stores, self.rows, strict=True):
            if (rows < 0).all():
                raise UserError(
                    f"the side-car {store.directory} has none of the keys of {shown(data.url)} (it has such "
                    f"as {store.example!r}, the data {next(iter(data.keys()))!r}); make it with the column "
                    "that holds them (longclip sidecar SRC --key COLUMN --out DIR), or give each source of "
                    "data.train its own: {folder: FOLDER, sidecar: {stores: [DIR]}}"
                )
        self._homes = {name: n for n, store in enumerate(self.stores) for name in store.kinds}
        for name in [*join.columns, *([join.scores] if join.scores else [])]:
            self._home(name, ("number", "vector") if name in join.columns else ("vector",))
        keep = self._keep()
        self.kept = None if keep.all() else np.flatnonzero(keep)
        self.shares = Shares(self.numbers(join.weight)[keep]) if join.weight else None
        self.__dict__.pop("_digests", None)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def choices(self) -> int:
        """How many samples are kept."""
        return len(self.data) if self.kept is None else len(self.kept)

    @property
    def checksum(self) -> int:
        """Of which samples are kept, and how often each is shown."""
        known = crc32(b"" if self.kept is None else self.kept.tobytes())
        return known if self.shares is None else crc32(self.shares.sums.tobytes(), known)

    @property
    def joined(self) -> dict[str, float]:
        """Side-car -> share of the samples that it knows."""
        found = (float((rows >= 0).mean()) for rows in self.rows)
        return {str(store.directory): share for store, share in zip(self.stores, found, strict=True)}

    def record(self, index: int) -> Record:
        """The stored record, scores and extra captions added."""
        record = self.data.record(index)
        captions = list(record.captions)
        if self.join.scores:
            for place, score in enumerate(self._vector(self.join.scores, index)[: len(captions)].tolist()):
                captions[place] = captions[place]._replace(score=None if isnan(score) else score)
        for store, rows in zip(self.stores, self.rows, strict=True):
            for name in (name for name, kind in store.kinds.items() if kind == "captions"):
                captions += store.captions(name, int(rows[index]), self.data.tokenizer)
        return record._replace(captions=tuple(captions)) if self.stores else record

    def columns(self, index: int) -> dict[str, torch.Tensor]:
        """The columns that batches carry: numbers [], vectors [d]; NaN where missing."""
        return {name: torch.from_numpy(self._value(name, index)) for name in self.join.columns}

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers by sample, NaN where missing."""
        number = self._home(name, ("number",))
        return self.stores[number].values(name, self.rows[number])

    def labels(self, name: str) -> NDArray[np.int64]:
        """A column by sample as labels, -1 where missing."""
        number = self._home(name, ("label", "number"))
        found = self.stores[number].values(name, self.rows[number])
        if found.dtype == np.int64:
            return found
        known = np.nan_to_num(found, nan=-1)
        if (known != np.floor(known)).any() or (known < -1).any():
            raise UserError(
                f"column {name!r} of {self.stores[number].directory} holds numbers that are no labels "
                f"(such as {found[known != np.floor(known)][:1]}); labels are whole numbers from 0 on, or "
                "words"
            )
        return known.astype(np.int64)

    @cached_property
    def _digests(self) -> Digests:
        return digests(self.data.keys())

    def _home(self, name: str, kinds: tuple[str, ...]) -> int:
        """The side-car that holds a column; the last of several."""
        known = {n: self.stores[home].kinds[n] for n, home in self._homes.items()}
        if known.get(name) not in kinds:
            listing = (
                ", ".join(f"{n} ({kind})" for n, kind in known.items())
                or "none: data.sidecar.stores=[DIR] names what longclip embed or longclip sidecar wrote"
            )
            raise UserError(
                f"the side-cars have no column {name!r} of kind {' or '.join(kinds)}; they have {listing}"
            )
        return self._homes[name]

    def _value(self, name: str, index: int) -> NDArray[Any]:
        number = self._home(name, ("number", "vector"))
        store, row = self.stores[number], self.rows[number][index : index + 1]
        if store.kinds[name] == "number":
            return store.values(name, row).astype(np.float32)[0, ...]
        found = store.vector(name, int(row[0]))
        return found.copy() if len(found) else np.full(store.width(name), np.nan, np.float32)

    def _vector(self, name: str, index: int) -> NDArray[np.float32]:
        number = self._home(name, ("vector",))
        return self.stores[number].vector(name, int(self.rows[number][index]))

    def _keep(self) -> NDArray[np.bool_]:
        keep = np.ones(len(self), bool)
        for column, rules in (self.join.filter or {}).items():
            for rule, value in rules.items():
                keep &= self._kept(column, rule, value)
                if not keep.any():
                    raise UserError(
                        f"data.sidecar.filter={{{column}: {{{rule}: {value}}}}} keeps none of the "
                        f"{len(self):,} samples of {shown(self.data.url)}{self._seen(column)}; choose another"
                    )
        if self.join.weight:
            weights = self.numbers(self.join.weight)
            if np.nanmin(weights, initial=0) < 0 or not (keep & (weights > 0)).any():
                raise UserError(
                    f"data.sidecar.weight={self.join.weight} is below 0 or never above it"
                    f"{self._seen(self.join.weight)}; weights are numbers from 0 on"
                )
            keep &= weights > 0
        return keep

    def _kept(self, column: str, rule: str, value: Any) -> NDArray[np.bool_]:
        if rule == "in":
            return self._among(column, Path(value))
        numbers = self.numbers(column)
        if rule == "at_least":
            return numbers >= value
        if rule == "at_most":
            return numbers <= value
        if not 0 < value <= 1:
            raise UserError(
                f"data.sidecar.filter has {column}: {{{rule}: {value}}}; it is a share, above 0 and up to 1"
            )
        best = np.argsort(-numbers if rule == "top" else numbers, kind="stable")  # NaN comes last
        keep = np.zeros(len(numbers), bool)
        keep[best[: int(np.ceil(value * np.isfinite(numbers).sum()))]] = True
        return keep

    def _among(self, column: str, path: Path) -> NDArray[np.bool_]:
        """Which samples a list names by their key, label or number."""
        if column == "key":
            wanted = digests(listed(path))
            return find(wanted[np.lexsort(wanted.T[::-1])], self._digests) >= 0
        number = self._home(column, ("label", "number"))
        found = self.stores[number].values(column, self.rows[number])
        words = list(listed(path))
        if found.dtype == np.int64:  # labels are words' digests, or the small numbers of `longclip cluster`
            numbers = [int(word) for word in words if word.isdecimal() and len(word) < 19]
            return np.isin(found, [*label_of(digests(words)), *numbers])
        try:
            return np.isin(found, [float(word) for word in words])
        except ValueError as error:
            raise UserError(
                f"{path} lists what is no number ({error}), and column {column!r} holds numbers: give one a "
                "line, or name a column of labels"
            ) from error

    def _seen(self, column: str) -> str:
        """What a column of numbers holds, for errors."""
        if column not in self._homes or self.stores[self._homes[column]].kinds[column] != "number":
            return ""
        numbers = self.numbers(column)
        known = numbers[np.isfinite(numbers)]
        spread = f"from {known.min():g} to {known.max():g}" if len(known) else "nothing"
        return f" (it holds {spread}, {len(numbers) - len(known):,} have no value)"


def listed(path: Path) -> Iterator[str]:
    """The words of a list: a text file, one a line; .npy of texts, or of DataComp's uids (pairs of uint64).

    Raises:
        UserError: the file is missing or of another form.
    """
    try:
        if path.suffix != ".npy":
            with open(path, encoding="utf-8") as lines:
                yield from (line.strip() for line in lines if line.strip())
            return
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a list ({error!s:.80}); give a text file of one key a line, or .npy"
        ) from error
    if found.dtype.kind == "U" and found.ndim == 1:
        yield from map(str, found)
    elif [found.dtype[n] for n in found.dtype.names or ()] == [np.dtype("u8")] * 2:
        yield from (f"{int(high):016x}{int(low):016x}" for high, low in found)
    else:
        raise UserError(f"{path} holds {found.dtype}; a list is of texts or of DataComp's uids (u8, u8)")
