"""Answers are those of a plain sort by cosine, sentence by sentence."""

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from longclip.search.query import Fit, Result, _fits
from longclip.types import UserError

QUERY = "A red bus waits. Behind it stands a tree without leaves, e.g. an oak. It rains!"
SENTENCES = ["A red bus waits.", "Behind it stands a tree without leaves, e.g. an oak.", "It rains!"]


def cosines(searcher, tiny, texts):
    """[texts, N] in float64, by open_clip's tokenizer and text tower."""
    ids_SL = open_clip.get_tokenizer(tiny)(texts)
    with torch.no_grad():
        text_SE = F.normalize(searcher.tower.backbone.encode_text(ids_SL), dim=-1).double()
    return (text_SE @ searcher.index.image_NE.double().T).numpy()


def test_pictures_come_by_cosine_with_the_whole_query(photos, search, tiny):
    searcher = search(photos)
    answer = searcher.answer(f"  {QUERY}\n", 4)
    score_N = cosines(searcher, tiny, [QUERY])[0]
    assert [result.number for result in answer.results] == np.argsort(-score_N)[:4].tolist()
    assert [result.score for result in answer.results] == pytest.approx(np.sort(score_N)[::-1][:4], abs=1e-5)
    assert [result.path for result in answer.results] == [
        searcher.index.files[result.number].path for result in answer.results
    ]


def test_each_sentence_has_its_cosine_its_place_and_how_far_it_stands_out(photos, search, tiny):
    searcher = search(photos)
    answer = searcher.answer(QUERY, 6)
    assert answer.sentences == SENTENCES
    score_SN = cosines(searcher, tiny, SENTENCES)
    for result in answer.results:
        for fit, score_N in zip(result.fits, score_SN, strict=True):
            assert fit.similarity == pytest.approx(score_N[result.number], abs=1e-5)
            assert fit.place == 1 + int((score_N > score_N[result.number]).sum())
            above = (score_N[result.number] - score_N.mean()) / score_N.std()
            assert fit.above == pytest.approx(above, abs=0.02)


def test_the_strongest_sentence_is_the_one_that_sets_the_picture_apart_not_the_one_with_the_highest_cosine():
    fits = [Fit(0.9, 0.1, 50), Fit(0.2, 2.5, 1), Fit(0.5, -1.0, 90)]
    assert Result(0, "x", 0.5, fits, None).strongest == 1


def test_pictures_that_score_the_same_share_the_worst_place():
    score_N = torch.tensor([0.5, 0.7, 0.5, 0.2])
    assert [fit.place for fit in _fits(score_N, [0, 1, 2, 3])] == [3, 1, 3, 4]


def test_a_long_query_says_where_its_first_77_tokens_alone_would_put_a_picture(photos, search, tiny):
    searcher = search(photos)
    words = "the small blue door of the old house beside the river " * 12
    answer = searcher.answer(words, 6)
    ids = searcher.tower.tokenizer.ids(words.strip())
    assert (answer.tokens, answer.unseen) == (len(ids) + 2, 0)
    tokenizer = open_clip.get_tokenizer(tiny)
    score_N = cosines(searcher, tiny, [tokenizer.decode(ids[:75])])[0]
    for result in answer.results:
        assert result.window_place == 1 + int((score_N > score_N[result.number]).sum())
    assert all(result.window_place is None for result in searcher.answer(QUERY, 6).results)


def test_what_the_model_does_not_read_is_counted(photos, search):
    searcher = search(photos)
    answer = searcher.answer("door " * 300, 1)
    assert (answer.tokens, answer.unseen) == (302, 302 - 248)


def test_one_picture_alone_can_be_searched(photos, search):
    for path in [*photos.rglob("*.png")][1:]:
        path.unlink()
    (result,) = search(photos).answer(QUERY, 5).results
    assert [fit.place for fit in result.fits] == [1, 1, 1]
    assert [fit.above for fit in result.fits] == [0, 0, 0]


@pytest.mark.parametrize("query", ["", "  \n "])
def test_an_empty_query_is_a_sentence(photos, search, query):
    with pytest.raises(UserError, match="the query is empty"):
        search(photos).answer(query, 5)
