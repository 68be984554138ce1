"""Compositional accuracy: counted by hand, blind models at nothing, ties and cuts against the model."""

from types import SimpleNamespace

import hydra
import pytest
import torch

from conf.launch import CONF, evaluators
from longclip.captions import Groups, Sentences
from longclip.evaluate import Swaps, examine
from longclip.evaluate.features import Features
from longclip.evaluate.swaps import _answers
from longclip.types import UserError


class Letters:
    """A tokenizer without ends."""

    prefix = suffix = ()

    def text(self, ids):
        return " ".join(map(str, ids))


def found(scores, tokens, dropped):
    """Features of images along the first axis whose texts have these cosines and say these ids."""
    score_NK = torch.tensor(scores)
    text_NKE = torch.stack([score_NK, (1 - score_NK**2).sqrt()], -1)
    lengths_NK = torch.tensor([[len(text) for text in row] for row in tokens])
    tokens_T = torch.tensor([i for row in tokens for text in row for i in text])
    image_NE = torch.tensor([[1.0, 0.0]]).expand(len(scores), 2)
    keys = [f"k{n}" for n in range(len(scores))]
    return Features(keys, image_NE, text_NKE, lengths_NK, torch.tensor(dropped), tokens_T)


def test_right_texts_must_score_strictly_higher():
    features = found(
        [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.0, 0.0], [0.7, 0.6]],
        [[[1, 2], [1, 3]], [[1, 2], [1, 3]], [[1, 2], [1, 3]], [[], []], [[1], [2]]],
        [[0, 0]] * 5,
    )
    each = _answers(features, slice(0, 2), Letters())
    assert list(each.keys) == ["k0", "k1", "k2", "k4"]
    assert list(each.values) == [100, 0, 0, 100]


def test_texts_that_are_cut_to_the_same_words_count_against_the_model():
    tokens = [[[1, 2], [1, 2]], [[1, 2], [1, 3]], [[1, 2], [1, 2, 3]]]
    features = found([[0.6, 0.5]] * 3, tokens, [[4, 4]] * 3)
    assert list(_answers(features, slice(0, 2), Letters()).values) == [0, 100, 100]


def test_scenes_have_pairs_of_most_kinds_and_numbers_are_means(tower, data):
    told = examine(tower, data, {"s": Swaps("heldout", batch_size=10)})["s"]
    kinds = {"colour", "number", "size", "material", "relation", "order"}
    assert set(told.numbers) == {"accuracy", "pairs"} | kinds
    for kind in kinds:
        assert told.numbers[kind] == pytest.approx(sum(told.each[kind].values) / len(told.each[kind].values))
    assert told.numbers["accuracy"] == pytest.approx(sum(told.numbers[kind] for kind in kinds) / len(kinds))
    assert told.numbers["pairs"] == sum(len(told.each[kind].keys) for kind in kinds) > 24 * 4


def test_the_same_pairs_are_judged_again_and_in_any_batches(tower, data):
    one, other = (
        examine(tower, data, {"s": Swaps("heldout", ["colour", "order"], whole=True, batch_size=size)})["s"]
        for size in (24, 7)
    )
    assert one.each.keys() == other.each.keys() == {"colour", "order"}
    assert all(list(one.each[kind].keys) == list(other.each[kind].keys) for kind in one.each)


class Oracle(torch.nn.Module):
    """Knows what is said of every image: a text that is one of its sentences fits, any other does not."""

    def __init__(self, tower, data):
        super().__init__()
        self.tokenizer, self.preprocess_cfg = tower.tokenizer, tower.preprocess_cfg
        self.unused = torch.nn.Parameter(torch.zeros(1))
        groups = Groups({"all": Sentences(40)}, seed=0, shuffle=False)
        ((samples, _),) = data.judge_batches("heldout", 24, groups)
        self.true = {(s.key, *text.ids) for s in samples for text in s.texts if text}

    def forward(self, batch, slots, needs=frozenset()):
        lengths_BK = torch.as_tensor(batch.lengths_BK)
        texts = [ids.tolist()[1:-1] for ids in batch.tokens_T.split(lengths_BK.flatten().tolist())]
        keys = [key for key in batch.keys for _ in range(lengths_BK.shape[1])]
        fits = [float((key, *text) in self.true) for key, text in zip(keys, texts, strict=True)]
        fits_BK = torch.tensor(fits).view(lengths_BK.shape)
        return SimpleNamespace(
            image_BE=torch.tensor([[1.0, 0.0]]).expand(len(batch.keys), 2),
            text_BKE=torch.stack([fits_BK, 1 - fits_BK], -1),
            mask_BK=lengths_BK > 0,
            patches_BPE=None,
            words=None,
        )


def test_who_knows_what_is_said_of_an_image_is_always_right(tower, data):
    told = examine(Oracle(tower, data), data, {"s": Swaps("heldout")})["s"]
    assert told.numbers["accuracy"] == 100


def test_a_collapsed_model_is_always_wrong(tower, data):
    oracle = Oracle(tower, data)
    oracle.true = set()
    assert examine(oracle, data, {"s": Swaps("heldout")})["s"].numbers["accuracy"] == 0


def test_the_files_run_as_they_are(tower, data):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("eval", ["benchmark=[scenes,swaps]"]).benchmark
    chosen = {name: e for name, e in evaluators(config).items() if "swaps" in name}
    told = examine(tower, data, chosen)
    assert set(told) == {"scenes/swaps", "swaps", "swaps_long"}
    assert told["scenes/swaps"].numbers == told["swaps"].numbers


def test_captions_without_anything_to_swap_are_a_sentence(tower, data):
    with pytest.raises(UserError, match=r"no caption of heldout names anything .* \(action\)"):
        examine(tower, data, {"s": Swaps("heldout", ["action"])})
