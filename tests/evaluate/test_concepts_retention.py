"""Diagnoses that need the training captions or another model."""

from collections import Counter
from types import SimpleNamespace

import hydra
import numpy as np
import pytest

from conf.launch import CONF, evaluators
from longclip.captions import Whole
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.data.tars.dataset import Dataset
from longclip.evaluate import Retrieval, examine
from longclip.evaluate.diagnostics import Concepts, Retention, retention
from longclip.evaluate.diagnostics.concepts import frequencies
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import Caption, UserError


def module(scenes, tower):
    return DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(64, 8), groups=None,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg,
    )  # fmt: skip


@pytest.fixture
def data(scenes, tower):
    return module(scenes, tower)


class Few:
    """Records of these captions."""

    def __init__(self, *captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def record(self, index):
        return SimpleNamespace(captions=tuple(Caption("a", text, ()) for text in self.captions[index]))


def test_a_word_counts_once_for_an_image_and_short_words_never():
    few = Few(["A red fox. A RED hen.", "the red fox"], ["the fox's den, by 12"], ["été"])
    assert frequencies(few, 10) == {
        "red": 1 / 3, "fox": 2 / 3, "hen": 1 / 3, "the": 2 / 3, "den": 1 / 3, "été": 1 / 3
    }  # fmt: skip


def test_a_sample_is_spread_over_all_training_images():
    assert set(frequencies(Few(*[[f"word{'abcdefghij'[n]}"] for n in range(10)]), 4)) == {
        "worda",
        "wordd",
        "wordg",
        "wordj",
    }


def test_concepts_are_sorted_by_their_frequency_and_each_counts_the_same(scenes, tower, data):
    edges, common = (0.2, 0.4), 0.9
    found = examine(tower, data, {
        "c": Concepts("heldout", edges=edges, common=common), "r": Retrieval("heldout", {"long": Whole()})
    })  # fmt: skip
    train, held = Dataset(scenes / "train"), Dataset(scenes / "heldout")
    words = [
        set("".join(c if c.isalpha() else " " for c in held.record(n).captions[0].text.lower()).split())
        for n in range(24)
    ]
    counts = Counter()
    for n in range(len(train)):
        text = train.record(n).captions[0].text.lower()
        counts.update(set("".join(c if c.isalpha() else " " for c in text).split()))
    hits = found["r"].each["long/t2i_r1"].values
    by_hand = {"head": [], "middle": [], "tail": []}
    for word in {w for of_image in words for w in of_image if len(w) > 2}:
        share = counts[word] / len(train)
        kind = "head" if share >= 0.4 else "middle" if share >= 0.2 else "tail"
        if 0 < share < common:
            by_hand[kind].append(
                np.mean([hit for hit, named in zip(hits, words, strict=True) if word in named])
            )
    numbers = found["c"].numbers
    assert {kind: numbers[f"{kind}/concepts"] for kind in by_hand} == {k: len(v) for k, v in by_hand.items()}
    for kind, values in by_hand.items():
        assert values, "the edges should leave no kind empty"
        assert numbers[f"{kind}/t2i_r1"] == pytest.approx(np.mean(values))
        assert np.mean(found["c"].each[f"{kind}/t2i_r1"].values) == pytest.approx(np.mean(values))
        assert found["c"].each[f"{kind}/t2i_r1"].keys == found["r"].each["long/t2i_r1"].keys


def test_what_training_never_named_is_unseen(scenes, tower, data, tmp_path):
    found = examine(tower, data, {"c": Concepts("heldout", train=str(scenes / "distractors"), common=1.1)})[
        "c"
    ]
    assert "distractors" not in found.each
    everything = sum(value for name, value in found.numbers.items() if name.endswith("/concepts"))
    held = Dataset(scenes / "heldout")
    assert everything == len(frequencies(held, 24))


def test_data_without_captions_to_count_is_a_sentence(tower):
    with pytest.raises(UserError, match=r"benchmark\.concepts\.train=FOLDER"):
        Concepts("heldout")(tower, object())


def test_a_model_keeps_all_of_itself(tower, data, monkeypatch, tiny):
    backbone = build(tiny, None, 248)
    monkeypatch.setattr(retention, "load", lambda name: backbone)
    same = DualTower(backbone)
    found = examine(same, data, {"r": Retention("heldout", "itself")})["r"]
    assert found.numbers.get("kept") == (100 if found.numbers["i2t_r1"] + found.numbers["t2i_r1"] else None)
    assert found.numbers["change_i2t"] == found.numbers["change_t2i"] == 0


def test_each_model_reads_with_its_own_context_and_preprocessing(tower, data, scenes, monkeypatch, tiny):
    other = build(tiny, None, None)
    other.tokenizer.context_length = 30  # shorter than every paragraph
    monkeypatch.setattr(retention, "load", lambda name: other)
    found = examine(tower, data, {"r": Retention("heldout", "other", Whole())})["r"]
    alone = DualTower(other)
    expected = examine(alone, module(scenes, alone), {"r": Retrieval("heldout", {"long": Whole()})})["r"]
    own = examine(tower, data, {"r": Retrieval("heldout", {"long": Whole()})})["r"]
    for name in ("i2t_r1", "t2i_r1"):
        assert found.each[f"reference/{name}"] == expected.each[f"long/{name}"]
        assert found.each[name] == own.each[f"long/{name}"]
        assert found.numbers[f"change_{name[:3]}"] == pytest.approx(
            own.numbers[f"long/{name}"] - expected.numbers[f"long/{name}"]
        )


def from_command_line(*words):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return evaluators(hydra.compose("eval", ["benchmark=retention", *words]).benchmark)["retention"]


def test_retention_without_a_reference_is_a_sentence(tower, data):
    with pytest.raises(UserError, match="reference=ViT-B-16/openai"):
        from_command_line()(tower, data)
    assert from_command_line("reference=runs/start").reference == "runs/start"
