"""Retrieval by late interaction: against loops over patches and words, the same whatever the tiles."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from longclip.captions import First, Groups, Whole
from longclip.evaluate import Retrieval, examine, retrieval
from longclip.evaluate.features import Features
from longclip.evaluate.late import Interaction
from longclip.evaluate.retrieval import search
from longclip.objectives import late
from longclip.types import UserError

WIDTH, SLOT = 6, slice(1, 3)
LENGTHS = np.array([[4, 5, 0], [3, 2, 8], [4, 0, 3], [2, 6, 6]])


def found(patches=None, words=None):
    """Features of four images; a text of slot 1 has no word."""
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 3, WIDTH, generator=random) if patches is None else patches
    words = torch.randn(LENGTHS.sum(), WIDTH, generator=random) if words is None else words
    lengths = torch.from_numpy(LENGTHS)
    return Features(
        keys=list("abcd"),
        image_NE=normalize(torch.randn(4, WIDTH, generator=random), dim=-1),
        text_NKE=torch.zeros(4, 3, WIDTH),
        lengths_NK=lengths,
        dropped_NK=lengths * 0,
        tokens_T=torch.zeros(LENGTHS.sum()),
        patches_NPE=normalize(patches, dim=-1),
        words_TE=normalize(words, dim=-1),
    )


def by_loop(seen):
    """[images, texts] both ways: mean over patches of the best word, mean over words of the best patch."""
    ends, texts = LENGTHS.cumsum().reshape(LENGTHS.shape), []
    for (n, k), length in np.ndenumerate(LENGTHS):
        if k > 0 and length:
            last = ends[n, k] - (1 if length > 2 else 0)  # without words the end token speaks
            texts.append(seen.words_TE[ends[n, k] - length + 1 : last].double())
    like = [[p.double() @ words.T for words in texts] for p in seen.patches_NPE]
    by_image = torch.tensor([[float(x.amax(1).mean()) for x in row] for row in like])
    return by_image, torch.tensor([[float(x.amax(0).mean()) for x in row] for row in like])


@pytest.mark.parametrize(("most", "captions"), [(1, 1), (40, 2), (10**6, 8)])
def test_scores_equal_a_loop_whatever_the_tiles_and_the_order(monkeypatch, most, captions):
    monkeypatch.setattr(late, "CPU_TILE", most)
    monkeypatch.setattr(late, "CAPTIONS", captions)
    seen = found()
    both, by_image, by_text = Interaction(seen, SLOT), *by_loop(seen)
    asked, picked = torch.tensor([3, 0, 2]), torch.tensor([4, 1])
    torch.testing.assert_close(both.of_images(asked)(slice(0, 3), slice(0, 6)), by_image[asked])
    torch.testing.assert_close(both.of_images(asked)(slice(1, 3), picked), by_image[asked[1:]][:, picked])
    torch.testing.assert_close(both.of_texts(slice(0, 6), slice(0, 4)), by_text.T)
    torch.testing.assert_close(both.of_texts(slice(2, 5), asked), by_text[asked].T[2:5])


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_ranks_follow_the_scores_of_their_own_direction(monkeypatch, at_once):
    monkeypatch.setattr(retrieval, "QUERIES", at_once)
    seen = found()
    by_image, by_text = by_loop(seen)
    owner = torch.from_numpy((LENGTHS[:, SLOT] > 0).nonzero()[0])
    ways = search(seen, SLOT)
    for n in range(4):
        right = owner == n
        assert ways["i2t"].rank_N[n] == 1 + (by_image[n][~right] >= by_image[n][right].max()).sum()
    for m, n in enumerate(owner.tolist()):
        others = torch.arange(4) != n
        assert ways["t2i"].rank_N[m] == 1 + (by_text[others, m] >= by_text[n, m]).sum()


def test_features_that_are_all_alike_are_all_wrong():
    alike = found(torch.ones(4, 3, WIDTH), torch.ones(LENGTHS.sum(), WIDTH).cumsum(1))
    ways = search(alike, SLOT)
    assert (ways["i2t"].rank_N > 1).all()
    assert (ways["t2i"].rank_N == 4).all()


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="1 of 4 image features are not finite"):
        search(found(torch.randn(4, 3, WIDTH).index_fill(0, torch.tensor([2]), torch.nan)), SLOT)


def test_a_set_is_judged_by_what_the_tower_says_of_patches_and_words(tower, data):
    views = {"short": First(), "long": Whole(limit=12)}
    judged = examine(
        tower,
        data,
        {
            way: Retrieval("heldout", views, batch_size=size, scoring=way)
            for way, size in (("global", 24), ("late", 5))
        },
    )
    assert judged["late"].numbers.keys() == judged["global"].numbers.keys()
    assert judged["late"].numbers["long/tokens"] == judged["global"].numbers["long/tokens"]
    ((_, batch),) = data.judge_batches("heldout", 24, Groups(views, seed=0, shuffle=False))
    with torch.no_grad():
        seen = tower.eval()(batch, {"all": slice(None)}, frozenset({"patches", "words"}))
    patches, ends = normalize(seen.patches_BPE, dim=-1), seen.words.lengths_BK.cumsum().reshape(24, 2)
    ranks = []
    for b in range(24):
        words = [
            normalize(
                seen.words.states_TE[ends[j, 1] - seen.words.lengths_BK[j, 1] + 1 : ends[j, 1] - 1], dim=-1
            )
            for j in range(24)
        ]
        scores = torch.stack([(patches[b] @ w.T).amax(1).mean() for w in words])
        ranks.append(int((scores >= scores[b]).sum()))
    assert list(judged["late"].ranked["long"].i2t_ranks) == ranks


def test_the_protocol_says_so(tower, data):
    class Published:
        """A set with a protocol."""

        id = "set/raw"

        def batches(self, tower, batch_size, groups):
            return data.judge_batches("heldout", batch_size, groups)

    for scoring, protocol in (("global", "set/raw"), ("late", "set/raw/late")):
        retrieval = Retrieval(Published(), {"short": First()}, scoring=scoring)
        assert examine(tower, data, {"x": retrieval})["x"].protocol == protocol


def test_towers_without_words_or_patches_and_unknown_scorings_are_refused(tower, data):
    tower.padded_because = "this test says so"
    with pytest.raises(UserError, match=r"scoring=late.*this test says so.*scoring=global"):
        Retrieval("heldout", scoring="late")(tower, data)
    with pytest.raises(UserError, match='choose "global" or "late"'):
        Retrieval("heldout", scoring="colbert")
