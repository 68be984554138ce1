"""Retrieval and pointing: by hand, against torchmetrics, and what ties may not win."""

import doctest

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.retrieval import RetrievalHitRate

from longclip import metrics
from longclip.metrics import centres_inside, directions, median_rank, places, pointing, recall, retrieval
from longclip.types import UserError


def random_set(images=40, texts=90, width=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(images, width, generator=random)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=random)])
    owner = owner[torch.randperm(texts, generator=random)]
    text = image[owner] + 1.5 * torch.randn(texts, width, generator=random)
    return torch.nn.functional.normalize(image), torch.nn.functional.normalize(text), owner


def test_worked_examples_hold():
    result = doctest.testmod(metrics, extraglobs={"torch": torch})
    assert result.failed == 0
    assert result.attempted >= 7


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_torchmetrics(k):
    image, text, owner = random_set()
    scores = retrieval(image, text, owner)
    similarity = image @ text.T
    right = owner == torch.arange(len(image))[:, None]
    for way, preds, target in (("i2t", similarity, right), ("t2i", similarity.T, right.T)):
        query = torch.arange(len(preds))[:, None].expand_as(preds)
        want = 100 * RetrievalHitRate(top_k=k)(preds.flatten(), target.flatten(), query.flatten())
        assert scores[f"{way}_r{k}"] == pytest.approx(want.item(), abs=1e-4)
    assert 0 < scores["i2t_r1"] < 100


def test_other_right_items_never_stand_in_the_way():
    query = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.95, 0.0]])
    found = places(query, items, torch.tensor([3]), torch.tensor([3, 3, 3, 1]))
    assert (found.rank_N.item(), found.rival_N.item()) == (2, 3)


def test_ties_count_against_the_model():
    query = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[0.5, 0.0], [0.5, 0.3], [0.2, 0.0]])
    found = places(query, items, torch.tensor([0]), torch.tensor([0, 1, 2]))
    assert (found.rank_N.item(), found.rival_N.item()) == (2, 1)


@pytest.mark.parametrize("constant", ["image", "text", "both"])
def test_constant_features_score_at_most_chance(constant):
    image, text, owner = random_set()
    image = image[:1].expand_as(image) if constant != "text" else image
    text = text[:1].expand_as(text) if constant != "image" else text
    scores = retrieval(image, text, owner)
    likeliest = 100 * owner.bincount().max().item() / len(owner)  # always naming the same image
    assert scores["i2t_r1"] <= 100 / 40
    assert scores["t2i_r1"] <= likeliest + 1e-9


@pytest.mark.parametrize(("chunk", "across"), [(7, 11), (1, 90), (40, 1)])
def test_chunks_do_not_matter(chunk, across):
    image, text, owner = random_set()
    for asked in directions(image, text, owner).values():
        whole, cut = places(*asked), places(*asked, chunk=chunk, across=across)
        assert torch.equal(whole.rank_N, cut.rank_N)
        assert torch.equal(whole.rival_N, cut.rival_N)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


def test_scores_are_never_in_memory_as_a_whole():
    image, text, owner = random_set(images=300, texts=400)
    asked = directions(image, text, owner)
    for query, item, *owners in asked.values():
        with Largest() as seen:
            places(query, item, *owners, chunk=20, across=30)
        assert seen.bytes <= max(20 * 30 * 8, item.numel() * 8)
        assert seen.bytes < len(query) * len(item)  # a bool for each pair would be as much


def test_the_rival_is_the_best_of_the_wrong_ones():
    image, text, owner = random_set()
    similarity = (image @ text.T).masked_fill(owner == torch.arange(len(image))[:, None], -2)
    assert torch.equal(places(*directions(image, text, owner)["i2t"]).rival_N, similarity.argmax(1))
    alone = places(image[:1], text[:2], torch.tensor([5]), torch.tensor([5, 5]))
    assert (alone.rank_N.item(), alone.rival_N.item()) == (1, -1)


def test_images_without_a_text_ask_nothing_but_stand_in_the_way():
    image = torch.eye(3)
    text = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])
    scores = retrieval(image, text, torch.tensor([0, 1]))
    assert (scores["i2t_queries"], scores["t2i_queries"]) == (2, 2)
    assert (scores["i2t_r1"], scores["t2i_r1"]) == (100, 50)


def test_median_and_recall_by_hand():
    places = torch.tensor([3, 1, 12, 6])
    assert median_rank(places) == 4.5
    assert median_rank(places[:3]) == 3
    assert [recall(places, k) for k in (1, 5, 10)] == [25, 50, 75]


def test_half_precision_features_are_scored_in_float32():
    image, text, owner = (x.bfloat16() if x.is_floating_point() else x for x in random_set())
    assert retrieval(image, text, owner) == retrieval(image.float(), text.float(), owner)


def test_equal_features_tie_wherever_they_stand():
    """Kernels sum in another order at the edge of a block: in float32 that would break ties at random."""
    right = torch.nn.functional.normalize(torch.randn(1, 512))
    items = right.repeat(1000, 1)
    for where in (0, 500, 999):
        owner = torch.arange(1000)
        found = places(torch.nn.functional.normalize(torch.randn(3, 512)), items, owner[[where] * 3], owner)
        assert found.rank_N.tolist() == [1000] * 3


def test_features_that_are_not_finite_are_refused():
    image, text, owner = random_set()
    text[[3, 5], 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(UserError, match="2 of 90 item features are not finite"):
        retrieval(image, text, owner)


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="nothing to judge"):
        retrieval(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


def test_a_query_without_right_item_is_a_fault():
    with pytest.raises(AssertionError, match="without a right item"):
        places(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 0]))


def test_pointing_by_hand_on_a_grid_that_is_not_square():
    """Two patches down, three across: centres at x = 1/6, 1/2, 5/6 and y = 1/4, 3/4."""
    lower_right = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert centres_inside(lower_right, (2, 3)).int().tolist() == [[0, 0, 0, 0, 1, 1]]
    for heaviest, hit in enumerate([False, False, False, False, True, True]):
        weights = torch.full((1, 6), 0.1)
        weights[0, heaviest] = 0.5
        hit_S, chance_S = pointing(weights, lower_right, (2, 3))
        assert hit_S.tolist() == [hit]
        assert chance_S.item() == pytest.approx(1 / 3)


def test_pointing_everywhere_is_a_miss():
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.4, 0.4], [0.0, 0.0, 1.0, 1.0]])
    hit_S, chance_S = pointing(torch.full((3, 4), 0.25), box)
    assert hit_S.tolist() == [False, False, True]
    assert chance_S.tolist() == [0.25, 0.0, 1.0]


def test_a_random_pointer_hits_as_often_as_chance_says():
    random = torch.Generator().manual_seed(0)
    box = torch.tensor([[0.2, 0.1, 0.7, 0.6]]).expand(4000, 4)
    hit_S, chance_S = pointing(torch.rand(4000, 49, generator=random), box)
    assert hit_S.float().mean() == pytest.approx(chance_S[0].item(), abs=0.03)


def test_weights_that_do_not_fill_the_grid_are_a_fault():
    with pytest.raises(AssertionError, match="grid"):
        pointing(torch.rand(1, 6), torch.rand(1, 4))
