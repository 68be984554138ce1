"""Captions chosen by score, and policies chosen by chance and by schedule: as often as they should be."""

import random
from array import array
from collections import Counter
from collections.abc import Callable
from math import e

import pytest

from longclip.captions import Best, First, Groups, Likely, Mix, Policy, Sentences, Swapped, Whole
from longclip.captions.mixing import PATIENCE
from longclip.types import Caption, Sentence, Text, UserError


def made(source: str, count: int, first_id: int = 100) -> Caption:
    """A caption of `count` sentences with two ids each, none of them equal."""
    sentences = [
        Sentence(3 * i, 3 * i + 2, array("H", (first_id + 2 * i, first_id + 2 * i + 1))) for i in range(count)
    ]
    return Caption(source, "a. " * count, tuple(sentences))


def scored(*scores: float | None) -> list[Caption]:
    return [made("a", 1, 100 * n)._replace(score=score) for n, score in enumerate(scores)]


def draws(policy: Policy, given: list[Caption], times: int) -> list[list[Text]]:
    return [policy(given, random.Random(seed)) for seed in range(times)]


def test_best_is_the_highest_score_wherever_it_stands() -> None:
    assert Best()(scored(0.2, None, 0.9, 0.5), random.Random(0))[0].ids.tolist() == [200, 201]
    mixed = [*scored(0.2, 0.9), made("b", 1, 500)._replace(score=0.3)]
    assert Best(source="b")(mixed, random.Random(0))[0].ids.tolist() == [500, 501]
    assert Best(source="none")(mixed, random.Random(0)) == []
    (whole,) = Best()([Caption("a", "", made("a", 2).sentences, 0.1)], random.Random(0))
    assert whole.ids.tolist() == [100, 101, 102, 103]


def test_likely_draws_in_proportion_to_the_exponent_of_the_score() -> None:
    seen = Counter(texts[0].ids[0] // 100 for texts in draws(Likely(0.5), scored(0.0, None, 0.5, 1.0), 3000))
    odds = [1, e, e**2]
    assert [seen[n] / 3000 for n in (0, 2, 3)] == pytest.approx([o / sum(odds) for o in odds], abs=0.04)
    assert {texts[0].ids[0] for texts in draws(Likely(1e-3), scored(0.0, 1.0), 20)} == {100}


@pytest.mark.parametrize("kind", [Best, lambda: Likely(0.1)])
def test_an_image_without_a_score_shows_its_first_caption(kind: Callable[[], Policy]) -> None:
    for first in (scored(None, None), scored(None, 0.5)):  # a run may begin with either
        policy = kind()
        policy(first, random.Random(0))
        assert {texts[0].ids[0] for texts in draws(policy, scored(None, None), PATIENCE - 2)} == {0}
    assert {texts[0].ids[0] for texts in draws(policy, scored(None, None), PATIENCE)} == {0}


@pytest.mark.parametrize("kind", [Best, lambda: Likely(0.1)])
def test_data_without_any_score_have_no_best(kind: Callable[[], Policy]) -> None:
    with pytest.raises(UserError, match=r"finds no score on any caption of the first 256 images; join"):
        draws(kind(), scored(None, None), PATIENCE)


VECLIP = Mix({"raw": Whole("raw"), "vecap": Whole("vecap")}, start={"raw": 0.3, "vecap": 0.7})


def shares(mix: Mix, progress: float = 0.0, given: tuple[str, ...] = ("raw", "vecap")) -> list[float]:
    """How often each of the sources is shown."""
    image = [made(source, 1, 100 * n) for n, source in enumerate(("raw", "vecap")) if source in given]
    found = [mix(image, random.Random(seed), progress)[0].ids[0] // 100 for seed in range(2000)]
    return [found.count(n) / len(found) for n in (0, 1)]


def test_a_mix_shows_each_source_with_its_probability() -> None:
    assert shares(VECLIP) == pytest.approx([0.3, 0.7], abs=0.04)
    assert shares(VECLIP, 1.0) == shares(VECLIP)


def test_a_mix_passes_over_what_an_image_does_not_have() -> None:
    assert shares(VECLIP, given=("raw",)) == [1.0, 0.0]
    assert VECLIP([made("other", 1)], random.Random(0)) == []
    never = Mix(VECLIP.policies, {"raw": 0, "vecap": 1})
    assert never([made("raw", 1)], random.Random(0)) == []
    wrong = Swapped(Whole())  # of which "a." has none: its slot is empty
    assert Mix({"a": wrong, "b": Whole()}, {"a": 1, "b": 1e-9})([made("raw", 1)], random.Random(0)) != [None]


def test_the_probabilities_of_a_mix_move_linearly_over_the_run() -> None:
    moving = Mix(VECLIP.policies, {"raw": 1, "vecap": 0}, {"raw": 0.2, "vecap": 0.8})
    for progress, raw in [(0.0, 1.0), (0.25, 0.8), (0.5, 0.6), (1.0, 0.2)]:
        assert shares(moving, progress) == pytest.approx([raw, 1 - raw], abs=0.04)


def test_a_group_of_mixed_policies_draws_anew_for_each_image_and_epoch() -> None:
    groups = Groups({"one": VECLIP, "sub": Mix({"a": First(), "b": Sentences(2)}, {"a": 1, "b": 1})}, seed=0)
    assert groups.count == 3
    image = [made("raw", 3, 0), made("vecap", 3, 100)]
    shown = {(key, epoch): groups.show(image, key, epoch) for key in "abcdefgh" for epoch in range(4)}
    assert len({tuple(texts[0].ids) for texts in shown.values() if texts[0]}) == 2
    assert any(shown[key, 0][0] != shown[key, 1][0] for key in "abcdefgh")
    assert shown["c", 2] == groups.show(image, "c", 2)
    assert {texts[2] is None for texts in shown.values()} == {True, False}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Likely(0), "Likely.temperature is 0"),
        (lambda: Mix({"a": Whole()}, {"b": 1}), r"Mix.start is {'b': 1}; give each of a a probability"),
        (lambda: Mix({"a": Whole()}, {"a": 1}, {"a": 0}), r"Mix.end is {'a': 0}"),
        (lambda: Mix({}, {}), r"Mix.start is {}; give each of its policies"),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], Policy], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
