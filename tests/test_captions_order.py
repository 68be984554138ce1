"""Policies that disturb a caption show all of its other sentences, each once."""

import random
from array import array
from itertools import chain, pairwise

import pytest

from longclip.captions import Beginning, Moved, Preceded, Prefixes, Shuffled, Whole, WithoutFirst
from longclip.types import Caption, Sentence, UserError


def made(count):
    """A caption of `count` sentences, sentence i being the ids (10 i, 10 i + 1)."""
    return Caption(
        "a",
        "a. " * count,
        tuple(Sentence(3 * i, 3 * i + 2, array("H", (10 * i, 10 * i + 1))) for i in range(count)),
    )


def order(policy, count):
    """The numbers of the sentences that it shows."""
    (text,) = policy([made(count), made(9)], random.Random(0))
    assert tuple(text.ids) == tuple(
        chain.from_iterable((10 * (i // 10), 10 * (i // 10) + 1) for i in text.ids[::2])
    )
    return [i // 10 for i in text.ids[::2]]


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [1, 0]), (3, [1, 2, 0]), (4, [1, 2, 3, 0]), (6, [1, 2, 3, 0, 4, 5])]
)
def test_the_first_sentence_moves_to_place_four_or_to_the_end(count, expected):
    assert order(Moved(4), count) == expected


def test_the_others_stay_without_the_first():
    assert order(WithoutFirst(), 4) == [1, 2, 3]


def test_shuffling_keeps_every_sentence_and_is_repeatable():
    assert sorted(order(Shuffled(), 8)) == list(range(8))
    assert order(Shuffled(), 8) == order(Shuffled(), 8) != list(range(8))


@pytest.mark.parametrize("policy", [Moved(4), WithoutFirst(), Shuffled()])
def test_one_sentence_has_no_order(policy):
    assert policy([made(1)], random.Random(0)) == []
    assert policy([], random.Random(0)) == []


def test_filler_comes_before_the_whole_caption():
    (text,) = Preceded((7, 7))([made(3)], random.Random(0))
    assert tuple(text.ids) == (7, 7, *Whole()([made(3)], random.Random(0))[0].ids)


@pytest.mark.parametrize(
    ("sentences", "parts", "lengths"), [(3, 3, [1, 2, 3]), (5, 2, [2, 5]), (7, 3, [2, 4, 7]), (2, 3, [])]
)
def test_beginnings_grow_by_nearly_equal_parts_to_the_whole(sentences, parts, lengths):
    texts = Prefixes(parts)([made(sentences)], random.Random(0))
    assert [len(text.ids) // 2 for text in texts] == lengths
    assert all(later.ids[: len(earlier.ids)] == earlier.ids for earlier, later in pairwise(texts))


def test_a_beginning_has_any_length_and_is_repeatable():
    drawn = [Beginning()([made(4)], random.Random(seed))[0].ids for seed in range(40)]
    assert {tuple(ids[::2]) for ids in drawn} == {(0,), (0, 10), (0, 10, 20), (0, 10, 20, 30)}
    assert drawn == [Beginning()([made(4)], random.Random(seed))[0].ids for seed in range(40)]
    assert Beginning()([], random.Random(0)) == []


def test_places_and_parts_that_change_nothing_are_refused():
    with pytest.raises(UserError, match=r"Moved.to is 1; it must be a whole number of at least 2"):
        Moved(1)
    with pytest.raises(UserError, match=r"Prefixes.count is 1"):
        Prefixes(1)
