"""One thing about a sentence made wrong: its colour, number, size or relation, or which thing is which.

In: a sentence, a kind of the lexicon, and what all captions of the image say. Out: sentences that read alike
and that no caption of the image says. A rule cannot see: what captions leave unsaid may be true all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from .lexicon import Lexicon, Word, words

_ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")


class Edit(NamedTuple):
    """`new` instead of what stands from `start` to `end`."""

    start: int
    end: int
    new: str


class Swap(NamedTuple):
    """A change of a sentence."""

    kind: str
    edits: tuple[Edit, ...]


class Said:
    """What the captions of an image say, sentence by sentence."""

    def __init__(self, sentences: Iterable[str], lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        contents = [lexicon.content(sentence) for sentence in sentences]
        self._bags = [frozenset(content) for content in contents]
        self._rows = [f" {' '.join(content)} " for content in contents]

    def has(self, old: str, swap: Swap) -> bool:
        """Whether the changed sentence is said, or may well be true by what is said."""
        row = f" {' '.join(self.lexicon.content(swapped(old, swap)))} "
        if any(row in known for known in self._rows):
            return True
        told = claims(old, swap, self.lexicon)
        if swap.kind != "order":
            return any(claim <= bag for claim in told for bag in self._bags)
        own = frozenset(self.lexicon.content(old))  # it has the same words
        others = [bag for bag in self._bags if bag != own]
        return bool(told) and all(any(claim <= bag for bag in others) for claim in told)


def swaps(sentence: str, kind: str, lexicon: Lexicon) -> list[Swap]:
    """All changes of one kind, in reading order, whether true or not."""
    if kind == "order":
        return [*_exchanged_attributes(sentence, lexicon), *_exchanged_things(sentence, lexicon)]
    return [
        Swap(kind, (Edit(match.start(), match.end(), new),))
        for match in lexicon.patterns[kind].finditer(sentence)
        for new in lexicon.others[kind][match[0].lower()]
    ]


def swapped(sentence: str, swap: Swap) -> str:
    """The sentence with the change made: capitals stay where they were, "a" and "an" follow the new word."""
    for start, end, new in sorted(swap.edits, reverse=True):
        before, old = sentence[:start], sentence[start:end]
        before = _ARTICLE.sub(rf"\g<1>{'n' if new[0].lower() in 'aeiou' else ''}\g<2>", before)
        new = new[0].upper() + new[1:] if old[0].isupper() else new
        sentence = before + new + sentence[end:]
    return sentence


def claims(sentence: str, swap: Swap, lexicon: Lexicon) -> list[frozenset[str]]:
    """What the change has the sentence say, as words that a caption would have in one sentence.

    Of an attribute: the new word and each thing that it may be said of. Of a relation: all that is said. Of
    an exchange: which two things there are then ("red square", "blue circle"); empty where that is not clear.
    """
    if swap.kind == "relation":
        return [frozenset(lexicon.content(swapped(sentence, swap)))]
    if swap.kind == "order":
        things = [_thing(sentence, edit, lexicon) for edit in swap.edits]
        return [thing for thing in things if thing] if all(things) else []
    (edit,) = swap.edits
    phrase = lexicon.phrase(sentence, edit.end)
    about = [lexicon.plain(word.low) for word in phrase if word.low not in lexicon.canonical]
    new = lexicon.plain(edit.new)
    return [frozenset([new, thing]) for thing in about] or [frozenset([new])]


def _thing(sentence: str, edit: Edit, lexicon: Lexicon) -> frozenset[str]:
    """A new attribute and its thing, or a new thing and the attribute before it; empty without such."""
    if edit.new in lexicon.canonical:
        beside = lexicon.phrase(sentence, edit.end)[-1:]
    else:
        before = words(sentence[: edit.start])[-1:]
        near = [word for word in before if not sentence[word.end : edit.start].strip()]
        beside = [word for word in near if word.low in lexicon.canonical]
    return frozenset([lexicon.plain(edit.new), lexicon.plain(beside[0].low)]) if beside else frozenset()


def _exchanged_attributes(sentence: str, lexicon: Lexicon) -> Iterator[Swap]:
    """ "A red circle on a blue square" -> "a blue circle on a red square"."""
    for kind in lexicon.attributes:
        for left, right in combinations(lexicon.patterns[kind].finditer(sentence), 2):
            one, other = left[0].lower(), right[0].lower()
            differ = lexicon.canonical[other] in lexicon.others[kind][one]
            if differ and _apart(sentence[left.end() : right.start()], lexicon):
                yield _exchange(Word(*left.span(), one), Word(*right.span(), other))


def _exchanged_things(sentence: str, lexicon: Lexicon) -> Iterator[Swap]:
    """ "The red circle is above the blue square" -> "The red square is above the blue circle"."""
    for match in lexicon.patterns["oriented"].finditer(sentence):
        left, right = _before(sentence, match.start(), lexicon), _after(sentence, match.end(), lexicon)
        if left is None or right is None or lexicon.plain(left.low) == lexicon.plain(right.low):
            continue
        between = words(sentence[left.end : right.start])
        symmetric = any(word.low in lexicon.words["symmetric"] for word in between)
        if left.low.endswith("s") == right.low.endswith("s") and not symmetric:
            yield _exchange(left, right)


def _exchange(one: Word, other: Word) -> Swap:
    return Swap("order", (Edit(one.start, one.end, other.low), Edit(other.start, other.end, one.low)))


def _apart(between: str, lexicon: Lexicon) -> bool:
    """Whether something is said between two words, and nothing that lets them change places."""
    found = words(between)
    if any(word.low in lexicon.words["symmetric"] for word in found):
        return False
    return any(not lexicon.is_function(word) for word in found)


def _before(sentence: str, end: int, lexicon: Lexicon) -> Word | None:
    """The thing that a relation is said of: the word before it, but for "is" and the like."""
    found = words(sentence[:end])
    while found and found[-1].low in lexicon.words["glue"]:
        end = found.pop().start
    if not found or sentence[found[-1].end : end].strip():
        return None
    return found[-1] if _is_noun(found[-1], lexicon) else None


def _after(sentence: str, start: int, lexicon: Lexicon) -> Word | None:
    """The thing that it is related to: the last word of the phrase behind "of the" and the like."""
    for word in words(sentence[start:]):
        if not lexicon.is_function(word):
            start = start + word.start
            break
    phrase = lexicon.phrase(sentence, start)
    if not phrase or lexicon.patterns["relation"].search(sentence, start, phrase[-1].end):
        return None
    return phrase[-1] if _is_noun(phrase[-1], lexicon) else None


def _is_noun(word: Word, lexicon: Lexicon) -> bool:
    """As far as lists can tell."""
    verb = word.low.endswith("ed") and word.low not in lexicon.words["nouns"]
    known = word.low in lexicon.canonical or word.low in ("left", "right", "top", "bottom", "front")
    return lexicon.is_thing(word) and not verb and not known
