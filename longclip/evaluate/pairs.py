"""Compositional pairs: does a picture fit its caption better than one that is almost the same?

In: a tower and a set of questions (`questions`). Out: the share of questions that are answered rightly, in
percent, over all and by kind. What is right must score strictly higher than what is wrong: a tie, as two
equal captions or a collapsed model make it, counts against the model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..metrics import cosine
from ..towers.asking import ask
from ..types import UserError
from .judging import Each, Findings, Judged
from .questions import Question, Questions
from .sharing import collect, share
from .showing import Picture, pixel_batches, protocol_id, text_features, transform_for

if TYPE_CHECKING:
    from ..towers.clip import DualTower


class Macro(NamedTuple):
    """One mean over the kinds, instead of a number for each."""

    least: int = 1  # questions; kinds with fewer are left out
    left_out: Sequence[str] = ()  # kinds


@dataclass(frozen=True)
class Choices:
    """One picture, right captions and wrong ones: SugarCrepe, ARO, counting, a user's own.

    Args:
        root: the folder of the set.
        questions: how it is written down.
        protocol: id of what is judged and how, see `protocol_id`.
        expected: questions that the published set has; None takes what there is.
        keys: SHA-256 of the published keys, sorted, one a line; None tells the digest and checks nothing.
        text_only: also report whether the two right captions are closer to each other than either is to a
            wrong one, without the picture (SugarCrepe++, Dumpala et al. 2024, arXiv 2406.11171).
        macro: for sets of many kinds.
        resize_mode: "shortest" (crop) or "squash"; None: the model's own.
        batch_size: questions asked at once.
    """

    root: str
    questions: Questions
    protocol: str = ""
    expected: int | None = None
    keys: str | None = None
    text_only: bool = False
    macro: Macro | None = None
    resize_mode: str | None = None
    batch_size: int = 64

    def __call__(self, tower: DualTower, data: Judged) -> Findings:
        asked = self.questions.read(self.root, "questions", self.expected, self.keys)
        _check(self.root, asked, self.text_only)
        answer = _fits_and_alike if self.text_only else _fits
        answers_NX = _answers(tower, [(q,) for q in asked], answer, self.batch_size, self.resize_mode)
        names = ("accuracy", "text_only") if self.text_only else ("accuracy",)
        guessed = [1 / math.comb(len(q.right) + len(q.wrong), len(q.right)) for q in asked]
        facts = {"chance": 100 * sum(guessed) / len(asked), "questions": float(len(asked))}
        found = _Answered([q.key for q in asked], [q.kind for q in asked], names, answers_NX)
        return _findings(
            found, facts, self.macro, protocol_id(self.protocol, self.expected, self.resize_mode)
        )


@dataclass(frozen=True)
class Twins:
    """Two pictures that look alike, each with its caption, in neighbouring rows of the listing: MMVP-VLM.

    Reported as Winoground names it: `image_score`, both captions find their picture, which is MMVP's number
    (Tong et al. 2024, arXiv 2401.06209); `text_score`, both pictures find their caption; `group_score`, all
    of it. The keywords are those of `Choices`; `expected` and `batch_size` count pairs.
    """

    root: str
    questions: Questions
    protocol: str = ""
    expected: int | None = None
    keys: str | None = None
    resize_mode: str | None = None
    batch_size: int = 32

    def __call__(self, tower: DualTower, data: Judged) -> Findings:
        expected = None if self.expected is None else 2 * self.expected
        pairs = _neighbours(self.questions.read(self.root, "pictures with a caption", expected, self.keys))
        if not pairs:
            raise UserError(f"{self.root}: no two neighbouring rows have their pictures; get the set again")
        answers_NX = _answers(tower, pairs, _twins, self.batch_size, self.resize_mode)
        keys, kinds = ["+".join(q.key for q in pair) for pair in pairs], [pair[0].kind for pair in pairs]
        found = _Answered(keys, kinds, ("image_score", "text_score", "group_score"), answers_NX)
        facts = {"chance": 25.0, "pairs": float(len(pairs))}
        return _findings(found, facts, None, protocol_id(self.protocol, self.expected, self.resize_mode))


Asked = Sequence[Question]
"""What is answered together: one question, or twins."""


class _Shown(NamedTuple):
    """Features of what some questions show and say, equal pictures and texts encoded once."""

    images: Mapping[Picture, Tensor]  # [E]
    texts: Mapping[str, Tensor]  # [E]
    cut: Mapping[str, bool]  # by the context length

    def image(self, question: Question) -> Tensor:
        return self.images[question.picture][None]

    def text(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([self.texts[caption] for caption in captions])


class _Answered(NamedTuple):
    keys: list[str]
    kinds: list[str]
    names: Sequence[str]  # of the first columns
    answers_NX: Tensor  # percent; the last column: of the captions that are cut


def _answers(
    tower: DualTower,
    groups: Sequence[Asked],
    answer: Callable[[_Shown, Asked], list[bool]],
    batch_size: int,
    resize_mode: str | None,
) -> Tensor:
    """[N, X + 1] in percent: what `answer` says of each group, and the share of its captions that are cut."""
    batches = [groups[at : at + batch_size] for at in range(0, len(groups), batch_size)]
    own = list(share(batches))
    pictures = [list(dict.fromkeys(q.picture for group in batch for q in group)) for batch in own]
    parts = []
    for batch, seen, pixels_BCHW in zip(
        own, pictures, pixel_batches(pictures, transform_for(tower, resize_mode)), strict=True
    ):
        captions = list(
            dict.fromkeys(text for group in batch for q in group for text in (*q.right, *q.wrong))
        )
        image_BE = ask(tower, pixels_BCHW)[0].image_BE.cpu()
        text_SE, cut_S = text_features(tower, captions, at_once=len(captions))
        shown = _Shown(
            dict(zip(seen, image_BE, strict=True)),
            dict(zip(captions, text_SE, strict=True)),
            dict(zip(captions, cut_S.tolist(), strict=True)),
        )
        parts.append(torch.tensor([_row(shown, group, answer) for group in batch]))
    return 100 * collect(parts, len(batches))


def _row(shown: _Shown, group: Asked, answer: Callable[[_Shown, Asked], list[bool]]) -> list[float]:
    cut = [shown.cut[text] for q in group for text in (*q.right, *q.wrong)]
    return [*map(float, answer(shown, group)), sum(cut) / len(cut)]


def _fits(shown: _Shown, group: Asked) -> list[bool]:
    (question,) = group
    image_1E = shown.image(question)
    lowest = cosine(image_1E, shown.text(question.right)).min()
    return [bool(lowest > cosine(image_1E, shown.text(question.wrong)).max())]


def _fits_and_alike(shown: _Shown, group: Asked) -> list[bool]:
    (question,) = group
    right_2E, wrong_WE = shown.text(question.right), shown.text(question.wrong)
    alike = cosine(right_2E[:1], right_2E[1:]).min() > cosine(right_2E, wrong_WE).max()
    return [*_fits(shown, group), bool(alike)]


def _twins(shown: _Shown, group: Asked) -> list[bool]:
    image_2E = torch.cat([shown.image(question) for question in group])
    score_22 = cosine(image_2E, shown.text([question.right[0] for question in group]))
    own_2, other_2 = score_22.diagonal(), score_22.fliplr().diagonal()  # of each picture
    text_score = bool((own_2 > other_2).all())
    image_score = bool((own_2 > other_2.flip(0)).all())
    return [image_score, text_score, image_score and text_score]


def _neighbours(asked: Asked) -> list[Asked]:
    """Rows 0 and 1, 2 and 3 ... of each listing, where both are there."""
    pairs: dict[tuple[str, int], list[Question]] = defaultdict(list)
    for question in asked:
        pairs[question.listing, question.row // 2].append(question)
    return [pair for pair in pairs.values() if len(pair) == 2]


def _check(root: str, asked: Asked, text_only: bool) -> None:
    odd = [q.key for q in asked if not q.wrong or (len(q.right) != 2 if text_only else not q.right)]
    if odd:
        wanted = "two right captions and a wrong one" if text_only else "a right caption and a wrong one"
        raise UserError(
            f"{root}: {len(odd)} questions do not have {wanted} ({odd[0]} ...); see questions.right, .wrong"
        )


def _findings(found: _Answered, facts: dict[str, float], macro: Macro | None, protocol: str) -> Findings:
    """Numbers over all, then by kind (or the mean over kinds), then the facts."""
    members: dict[str, list[int]] = defaultdict(list)
    for place, kind in enumerate(found.kinds):
        members[kind].append(place)
    each, kinds = {}, {}
    for column, name in enumerate(found.names):
        values = found.answers_NX[:, column].tolist()
        each[name] = Each(found.keys, values)
        of_kind = {
            kind: Each([found.keys[n] for n in own], [values[n] for n in own])
            for kind, own in members.items()
        }
        if macro:
            kinds[f"macro_{name}"] = _mean_over_kinds(of_kind, macro)
        elif len(members) > 1:
            kinds |= {f"{kind}/{name}": answers for kind, answers in of_kind.items()}
    each |= kinds
    numbers = {name: sum(answers.values) / len(answers.values) for name, answers in each.items()}
    return Findings(numbers | facts | {"truncated": float(found.answers_NX[:, -1].mean())}, protocol, each)


def _mean_over_kinds(of_kind: Mapping[str, Each], macro: Macro) -> Each:
    kept = {
        kind: sum(answers.values) / len(answers.values)
        for kind, answers in of_kind.items()
        if len(answers.values) >= macro.least and kind not in macro.left_out
    }
    if not kept:
        raise UserError(f"no kind has {macro.least} questions or all are left out: set macro.least lower")
    return Each(list(kept), list(kept.values()))
