"""From a caption as its source wrote it to a `Caption`: cleaned, split into sentences, tokenised.

`split` gives character spans, stripped, not empty, in order, never overlapping; nothing but separators
lies between them. Line breaks and `</s>` always separate; inside a line the chosen method decides.

`syntok` is syntok's segmenter with its known faults on captions mended below. It cuts only where
open_clip's token pattern has a word boundary (at whitespace, or between a stop and a letter or digit), so
that ids made sentence by sentence concatenate to the ids of the whole. `dreamlip` cuts at every full stop
and drops it, as the released DreamLIP does ("3.5 m" becomes two): for reproduction only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import regex
from syntok import segmenter

from longclip.tokens import Tokenizer, repair
from longclip.types import Box, Caption, Sentence, UserError

Span = tuple[int, int]

BREAK = re.compile(r"[\n\r\v\f\x85\u2028\u2029]|</s>")

_CLOSERS = r"""["'”’»」』）】》)\]]*"""
_IDEOGRAPH = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
_ELLIPSIS = regex.compile(rf"…{_CLOSERS}\s+(?=[\"“‘(]?\p{{Lu}})")
# ftfy turns the full-width ！ and ？ into ASCII, so these count wherever an ideograph stands before them.
# A straight quote opens or closes; `_after_stop` decides.
_CJK_STOP = regex.compile(rf"(?:[。｡！？]|(?<={_IDEOGRAPH}|[!?。])[!?])+[”’»」』）】》)]*")
_WORD = regex.compile(r"[\p{L}\p{N}]")
_GLUED = regex.compile(r"(?<=\p{Ll}{2}[.!?])(?=\p{Lu}(?:\p{Ll}|\s))")  # "on the rim.The second"
_QUOTATION = regex.compile(r"""(?<![^\s(\[])["“](?=\S)[^"“”]{1,200}["”]""")

_MARKER = re.compile(r"[-*•–]|\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]+)[.)]")  # of a list item
_NEVER_LAST = re.compile(r"(?:^|[\s(\"'])(?:e\.g|i\.e|cf|vs|viz|approx)\.$", re.IGNORECASE)
_SELDOM_LAST = re.compile(r"(?:^|[\s(\"'])(?:Jr|Sr|Rev|Gov|Lt|Sgt|Rep|Ft|Pt|Blvd|Rd|Hwy)\.$")
_STARTER = re.compile(
    r"(?:An?|The|Th[eo]se|Th[ai][ts]|Its?|He|She|They|His|Her|Their|We|You|I|T?[Hh]ere|In|On|At|To|From|"
    r"Behind|Above|Below|Beside|Between|Under|Next|Near|Each|Every|One|Two|Both|All|Some|Several|Many)\b"
)
_LOWER_STOP = regex.compile(rf"(\S*[.!?…]{_CLOSERS}\s+)(\p{{Ll}})")
_LOWER_ABBREVIATION = re.compile(
    r"(?:e\.g|i\.e|cf|vs|viz|approx|etc|dr|mrs?|ms|st|mt|ft|[js]r|prof|rev|gov|sgt|lt|fig|ave|blvd|rd|oz|lbs?|"
    r"[cm]m|yrs|\w)\."
)


def split(text: str, method: str = "syntok") -> list[Span]:
    """Spans of the sentences of `text`.

    Raises:
        UserError: when there is no such method.
    """
    if method not in METHODS:
        raise UserError(f"There is no sentence splitter {method!r}; choose one of {', '.join(METHODS)}.")
    spans, start = [], 0
    for stop, following in [*(match.span() for match in BREAK.finditer(text)), (len(text), len(text))]:
        spans += [(start + a, start + b) for a, b in METHODS[method](text[start:stop])]
        start = following
    return spans


def parse(
    text: object,
    source: str,
    tokenizer: Tokenizer,
    method: str = "syntok",
    boxes: Sequence[Box | None] | None = None,
    where: str = "",
) -> Caption:
    """Clean, split and tokenise one caption.

    Lines are cleaned one by one and joined by a space, so that line breaks and `</s>` end a sentence and
    leave no trace in the text. But for `</s>`, the sentences' ids concatenate to open_clip's ids of `text`
    (with `dreamlip` less the full stops, which that method drops).

    Args:
        text: one caption; any type is taken, so that a wrong one can be refused.
        source: who wrote it.
        tokenizer: makes the ids.
        method: how to split, see `sentences.METHODS`.
        boxes: one per sentence, where the data knows them.
        where: file and line or sample key, for error messages.

    Raises:
        UserError: when `text` is no string or holds nothing, or `boxes` has another length.
    """
    place = f" in {where}" if where else ""
    if not isinstance(text, str):
        raise UserError(
            f"The caption {source!r}{place} is a {type(text).__name__}, not a string; "
            "give a list of captions one by one."
        )
    lines = [line for line in (" ".join(part.split()) for part in BREAK.split(repair(text))) if line]
    sentences: list[Sentence] = []
    start = 0
    for line in lines:
        sentences += [
            Sentence(start + a, start + b, tokenizer.ids(line[a:b])) for a, b in split(line, method)
        ]
        start += len(line) + 1
    sentences = [sentence for sentence in sentences if sentence.ids]  # some cleanings leave nothing of "?!"
    if not sentences:
        raise UserError(
            f"The caption {source!r}{place} is empty ({text[:40]!r}); fill it in or leave the caption out."
        )
    if boxes is not None and len(boxes) != len(sentences):
        raise UserError(
            f"The caption {source!r}{place} has {len(sentences)} sentences but {len(boxes)} boxes; "
            "give one box (or null) per sentence."
        )
    if boxes is not None:
        sentences = [s._replace(box=box) for s, box in zip(sentences, boxes, strict=True)]
    return Caption(source, " ".join(lines), tuple(sentences))


def tokenise(caption: Caption, tokenizer: Tokenizer) -> Caption:
    """The same caption with ids where its sentences have none yet."""
    sentences = (
        s if s.ids else s._replace(ids=tokenizer.ids(caption.text[s.start : s.end]))
        for s in caption.sentences
    )
    return caption._replace(sentences=tuple(sentences))


def texts_of(value: object, where: str, allow_string: bool = False) -> list[str]:
    """A data set's list of captions, checked: a string taken for a list would become single letters.

    Args:
        value: what the data set has there.
        where: file and line or sample key, for error messages.
        allow_string: take one string as a list of one.

    Raises:
        UserError: for a string (unless allowed), a list of letters, or anything but strings in a list.
    """
    if isinstance(value, str) and allow_string:
        return [value]
    if isinstance(value, str):
        raise UserError(
            f"Captions in {where} are one string ({value[:40]!r}) where a list is meant; "
            "write [caption] or name the field as a single caption."
        )
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise UserError(f"Captions in {where} must be a list of strings; found {str(value)[:60]!r}.")
    if len(value) > 2 and all(len(item) <= 1 for item in value):
        raise UserError(
            f"Captions in {where} are single letters ({''.join(value)[:40]!r}): a string was taken "
            "for a list somewhere before; write [caption]."
        )
    return list(value)


def _dreamlip(line: str) -> list[Span]:
    return _stripped(line, [match.span() for match in re.finditer(r"[^.]+", line)])


def _syntok(line: str) -> list[Span]:
    quotations = [match.span() for match in _QUOTATION.finditer(line)]
    found = {*_segmented(line), *_after_stop(line), *(match.end() for match in _ELLIPSIS.finditer(line))}
    cuts = sorted(cut for cut in found if not any(a < cut < b for a, b in quotations))
    spans = _stripped(line, list(zip([0, *cuts], [*cuts, len(line)], strict=True)))
    return _joined(line, spans)


METHODS: dict[str, Callable[[str], list[Span]]] = {"syntok": _syntok, "dreamlip": _dreamlip}
"""How to split one line, by name."""


def _segmented(line: str) -> Iterator[int]:
    """Where syntok starts a sentence, moved or left out where that would fall inside a word."""
    for paragraph in segmenter.analyze(_capitalised(line)):
        for sentence in paragraph:
            cut = sentence[0].offset
            if cut == 0 or line[cut - 1].isspace() or _GLUED.match(line, cut):
                yield cut
                continue
            while cut > 0 and not line[cut - 1].isspace() and not line[cut - 1].isalnum():
                cut -= 1  # syntok leaves some marks before the first word out of it
            if cut == 0 or line[cut - 1].isspace():
                yield cut


def _capitalised(line: str) -> str:
    """syntok never cuts before a small letter, so captions without any capital are lent some."""
    if any(char.isupper() for char in line):
        return line

    def lend(match: regex.Match[str]) -> str:
        word, letter = match[1].strip("\"'() "), match[2].upper()
        keep = _LOWER_ABBREVIATION.fullmatch(word) or len(letter) != 1
        return match[0] if keep else match[1] + letter

    return _LOWER_STOP.sub(lend, line)


def _after_stop(line: str) -> Iterator[int]:
    """Cuts after Chinese and Japanese stops, which need no space behind them.

    Not before an opening bracket or quote: it shares a token with the stop in open_clip's pattern.
    """
    for match in _CJK_STOP.finditer(line):
        cut = match.end()
        if line[cut : cut + 1] == '"' and line.count('"', 0, cut) % 2 == 1:
            cut += 1
        if cut < len(line) and (line[cut].isspace() or _WORD.match(line, cut)):
            yield cut


def _joined(line: str, spans: list[Span]) -> list[Span]:
    """Sentences, with what was cut off one of them put back."""
    kept: list[Span] = []
    for span in spans:
        if kept and _belongs(line[slice(*kept[-1])], line[slice(*span)]):
            kept[-1] = (kept[-1][0], span[1])
        else:
            kept.append(span)
    return kept


def _belongs(left: str, right: str) -> bool:
    if not _WORD.search(right) or _MARKER.fullmatch(left) or _NEVER_LAST.search(left):
        return True
    return bool(_SELDOM_LAST.search(left)) and not _STARTER.match(right)


def _stripped(line: str, spans: list[Span]) -> list[Span]:
    """Without the whitespace at their ends; those that held nothing else are gone."""
    pieces = [(a, line[a:b]) for a, b in spans]
    starts = [(a + len(piece) - len(piece.lstrip()), piece.strip()) for a, piece in pieces]
    return [(a, a + len(piece)) for a, piece in starts if piece]
