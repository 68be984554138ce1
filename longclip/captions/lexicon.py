"""What may stand in whose place, and what is said in a sentence: the words behind rule-made negatives.

In: a YAML file of groups of words that exclude each other (lexicon.yaml, beside this file, or a user's own).
Out: a `Lexicon`. English, and no grammar beyond lists: what cannot be told by them is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from longclip.types import UserError

OWN = Path(__file__).with_name("lexicon.yaml")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
LONGEST = 4  # words of a phrase such as "small striped red circle"


class Word(NamedTuple):
    """Where a word stands in its sentence, in small letters."""

    start: int
    end: int
    low: str


class Lexicon(NamedTuple):
    """Words by what they do."""

    others: Mapping[str, Mapping[str, Sequence[str]]]  # kind -> phrase -> what may stand in its place
    patterns: Mapping[str, re.Pattern[str]]  # kind -> any of its phrases; "oriented": what order depends on
    canonical: Mapping[str, str]  # synonym -> the one that is written
    words: Mapping[str, frozenset[str]]  # function, glue, nouns, symmetric, spatial

    @property
    def attributes(self) -> list[str]:
        """The kinds that say something of one thing."""
        return [kind for kind in self.others if kind != "relation"]

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that can be asked for."""
        return (*self.others, "order")

    def content(self, sentence: str) -> list[str]:
        """What it says, word by word: no function words, one word for all synonyms, no plural."""
        function, plain = self.words["function"], self.plain
        return [plain(low) for low in WORD.findall(sentence.lower()) if low not in function]

    def plain(self, low: str) -> str:
        """The word that stands for a word."""
        low = self.canonical.get(low, low)
        return low.removesuffix("s") if len(low) > 3 else low

    def is_function(self, word: Word) -> bool:
        """Whether a word says nothing of its own."""
        return word.low in self.words["function"]

    def is_thing(self, word: Word) -> bool:
        """Whether a word may belong to what a phrase is about: neither "the" nor "behind" nor "reading"."""
        if word.low.endswith("ing") and word.low not in self.words["nouns"]:
            return False
        return not any(word.low in self.words[name] for name in ("function", "symmetric", "spatial"))

    def phrase(self, sentence: str, start: int) -> list[Word]:
        """The words from here on that belong together: "striped red circle"."""
        found: list[Word] = []
        for match in WORD.finditer(sentence, start):
            word = Word(match.start(), match.end(), match[0].lower())
            if sentence[start : word.start].strip() or not self.is_thing(word) or len(found) == LONGEST:
                break
            found.append(word)
            start = word.end
        return found


def words(sentence: str) -> list[Word]:
    """All of them, in order."""
    return [Word(match.start(), match.end(), match[0].lower()) for match in WORD.finditer(sentence)]


@lru_cache(maxsize=8)
def load(path: str | None = None) -> Lexicon:
    """A lexicon from its file; None: our own.

    Raises:
        UserError: the file is missing, or has no such groups.
    """
    try:
        given = yaml.safe_load(Path(path or OWN).read_text(encoding="utf-8"))
        kinds = {**given["attributes"], "relation": given["relations"]}
        entries = {kind: [_entries(group) for group in groups] for kind, groups in kinds.items()}
        lists = {name: frozenset(given[name]) for name in ("function", "glue", "nouns", "symmetric")}
        oriented = [*_phrases(entries["relation"]), *given["oriented"]]
        lists["spatial"] = frozenset(phrase for phrase in oriented if " " not in phrase)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"lexicon={path} cannot be used ({type(error).__name__}: {error}); write it as {OWN} is written"
        ) from error
    patterns = {kind: _any(_phrases(groups)) for kind, groups in entries.items()}
    return Lexicon(
        others={kind: _others(groups) for kind, groups in entries.items()},
        patterns=patterns | {"oriented": _any(oriented)},
        canonical={
            synonym: entry[0]
            for groups in entries.values()
            for group in groups
            for entry in group
            for synonym in entry
        },
        words=lists,
    )


def _entries(group: Any) -> list[list[str]]:
    return [str(entry).split("/") for entry in group]


def _phrases(groups: Iterable[list[list[str]]]) -> Iterator[str]:
    return (phrase for group in groups for entry in group for phrase in entry)


def _any(phrases: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)


def _others(groups: list[list[list[str]]]) -> dict[str, list[str]]:
    """Of every phrase, what excludes it, over all groups that have it."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for entry in group:
            for phrase in entry:
                found.setdefault(phrase, []).extend(other[0] for other in group if other is not entry)
    return found
