"""Sentences and phrases beside the whole caption: cut as read, each shown once, seeded."""

import random
from array import array

import pytest

from longclip.captions import Groups, Parts, Whole, split
from longclip.captions.phrases import phrases
from longclip.types import Caption, Sentence, UserError


def caption(said, source="raw"):
    """With one id for each letter, its place in the text."""
    return Caption(source, said, tuple(Sentence(*span, array("H", range(*span))) for span in split(said)))


THREE = "A red kite flies above the old stone bridge. Two men in grey coats watch it. It is late."


@pytest.mark.parametrize(
    ("sentence", "want"),
    [
        ("A cat's tail hangs over the well-worn couch.", ["A cat's tail hangs", "the well-worn couch"]),
        ("To the right of the large blue square is a star.", ["the large blue square"]),
        ("The dog; BEHIND the very tall tree", ["the very tall tree"]),
        ("It is there.", []),
        ("", []),
    ],
)  # fmt: skip
def test_phrases_lie_between_words_that_only_join(sentence, want):
    assert list(phrases(sentence)) == want


def test_parts_are_sentences_of_the_whole_and_then_phrases():
    shown = Parts(2, 3)([caption(THREE)], random.Random(0))
    assert [text.words is None for text in shown] == [True, True, False, False, False]
    whole = Whole()([caption(THREE)], random.Random(0))[0].ids
    assert all(set(text.ids) <= set(whole) for text in shown[:2])
    assert all(text.words in THREE for text in shown[2:])
    assert {t.words for t in shown[2:]} <= {
        "A red kite flies", "the old stone bridge", "Two men", "grey coats watch"
    }  # fmt: skip


def test_every_part_has_its_turn_and_none_is_shown_twice():
    seen = set()
    for seed in range(40):
        shown = [
            text.words or text.ids.tobytes() for text in Parts(1, 2)([caption(THREE)], random.Random(seed))
        ]
        assert len(set(shown)) == len(shown) == 3
        seen |= set(shown)
    assert len(seen) == 3 + 4


def test_what_is_the_whole_caption_or_a_whole_sentence_is_left_out():
    assert [t.words for t in Parts(3, 3)([caption("Green grass under trees.")], random.Random(0))] == [
        "Green grass"
    ]
    shown = Parts(3, 3)([caption("A big tree. Green grass under it.")], random.Random(0))
    assert [text.words for text in shown] == [None, None, "Green grass"]


def test_parts_are_of_the_caption_that_whole_shows():
    given = [caption(THREE), caption("A blue boat lies on white sand. Waves come.", "other")]
    for epoch in range(6):
        groups = Groups({"long": Whole(), "parts": Parts(1, 1)}, seed=3).reading(
            lambda words: array("H", [len(words)])
        )
        whole, sentence, phrase = groups.show(given, "key", epoch)
        assert set(sentence.ids) <= set(whole.ids)
        assert phrase.ids[0] == len(phrase.words)
        shown = next(c.text for c in given if whole.ids[-1] == len(c.text) - 1)
        assert phrase.words in shown
    assert Parts(1, 1, source="none")(given, random.Random(0)) == []


def test_a_group_of_no_parts_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        Parts(0, 0)
    with pytest.raises(UserError, match=r"Parts.phrases is -1"):
        Parts(2, -1)
