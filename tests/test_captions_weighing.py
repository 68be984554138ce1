"""Captions weighed by their scores: in losses, or by the sampler, and never by both."""

import random
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest

from longclip.captions import Groups, Scored, Sentences, Whole
from longclip.types import Caption, Sentence, Text, UserError


def made(score: float | None, first_id: int, count: int = 2) -> Caption:
    sentences = [Sentence(3 * i, 3 * i + 2, array("H", [first_id + i])) for i in range(count)]
    return Caption("a", "a. " * count, tuple(sentences), score)


IMAGE = [made(0.1, 100), made(0.25, 200), made(None, 300), made(0.9, 400)]


def test_the_weight_rises_from_low_to_high_and_is_one_without_a_score() -> None:
    policy = Scored(Whole(), low=0.2, high=0.3)
    shown = {c.score: [t.weight for t in policy([c], random.Random(0))] for c in IMAGE}
    assert shown == {0.1: [], 0.25: [pytest.approx(0.5)], None: [1.0], 0.9: [1.0]}


def test_the_next_caption_takes_the_place_of_one_without_weight() -> None:
    texts = Scored(Whole(), low=0.2, high=0.3)(IMAGE, random.Random(0))
    assert [list(t.ids) for t in texts] == [[200, 201]]
    assert Scored(Whole(), low=2, high=3)([IMAGE[0]], random.Random(0)) == []


def test_texts_keep_the_weight_of_the_caption_that_they_come_from() -> None:
    texts = Scored(Sentences(4), low=0.2, high=0.3)(IMAGE, random.Random(0))
    assert sorted((t.ids[0] // 100, round(t.weight, 3)) for t in texts) == [
        (2, 0.5),
        (2, 0.5),
        (3, 1),
        (3, 1),
    ]
    assert len(Scored(Sentences(3), low=0.2, high=0.3)(IMAGE, random.Random(0))) == 3


def test_what_an_earlier_caption_has_said_is_not_said_again() -> None:
    texts = Scored(Sentences(4), low=0, high=1)(
        [made(0.5, 100), made(0.9, 101), made(1, 200)], random.Random(0)
    )
    said = [text.ids[0] for text in texts if text]
    assert len(texts) == 4
    assert sorted(said) == [100, 101, 102], "101 is in both, and its slot stays empty the second time"


def test_a_sampler_draws_by_weight_and_spends_it() -> None:
    policy = Scored(Whole(), low=0, high=1, draw=True)
    image = [made(0.2, 100), made(0.6, 200), made(0.0, 300)]
    texts = [policy(image, random.Random(seed))[0] for seed in range(3000)]
    seen = Counter(text.ids[0] // 100 for text in texts)
    assert seen[1] / 3000 == pytest.approx(0.25, abs=0.03)
    assert seen[3] == 0
    assert {text.weight for text in texts} == {1.0}


def test_weights_reach_the_slots_of_a_recipe() -> None:
    groups = Groups({"one": Scored(Sentences(2), low=0, high=1)}, seed=0)
    slots = groups.show([made(0.5, 100, count=1)], "key", 0)
    assert [text and text.weight for text in slots] == [0.5, None]


def test_slots_that_a_policy_leaves_empty_stay_empty() -> None:
    class Gappy:
        count = 3

        def __call__(
            self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0
        ) -> list[Text | None]:
            return [Text(captions[0].sentences[0].ids), None, Text(captions[0].sentences[1].ids)]

    texts = Scored(Gappy(), low=0, high=1)([made(0.5, 100)], random.Random(0))
    assert [text and (text.ids[0], text.weight) for text in texts] == [(100, 0.5), None, (101, 0.5)]


def test_scores_that_cross_are_refused() -> None:
    with pytest.raises(UserError, match=r"Scored.low is 0.3 and Scored.high 0.3"):
        Scored(Whole(), low=0.3, high=0.3)
