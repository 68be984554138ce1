"""Diagnoses of made-up features, whose answers can be counted, and of a tiny model on scenes."""

import math

import hydra
import numpy as np
import pytest
import torch
from folders import BUILDERS
from torch.nn import functional as F

from conf.launch import CONF, evaluators
from longclip.captions import Whole
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.evaluate import Retrieval, examine
from longclip.evaluate.diagnostics import (
    ByLength,
    Diagnostics,
    EffectiveLength,
    HiMo,
    Order,
    Space,
    Truncation,
)
from longclip.evaluate.diagnostics.lengths import crossing
from longclip.evaluate.diagnostics.seen import Seen
from longclip.evaluate.features import Features
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build


def seen(image_NE, texts, lengths=None, dropped=None):
    """What a model would have made of views that have these texts: name -> [N, k, E]."""
    text_NKE = torch.cat(list(texts.values()), 1)
    slots, start = {}, 0
    for name, text in texts.items():
        slots[name] = slice(start, start + text.shape[1])
        start += text.shape[1]
    lengths = torch.full(text_NKE.shape[:2], 9) if lengths is None else lengths
    dropped = torch.zeros_like(lengths) if dropped is None else dropped
    keys = [f"k{n}" for n in range(len(image_NE))]
    return Seen(Features(keys, image_NE, text_NKE, lengths, dropped, torch.zeros(0)), slots)


@pytest.fixture
def data(scenes, tower):
    return module(scenes, tower)


def module(scenes, tower):
    return DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(64, 8), groups=None,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg,
    )  # fmt: skip


PARTS = {
    "length": EffectiveLength(), "by_length": ByLength(), "truncation": Truncation(), "order": Order(),
    "himo": HiMo(), "space": Space(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({20: 50.0, 77: 50.0, 248: 50.0}, 20),  # flat: the first words are all it reads
        ({20: 0.0, 40: 0.0, 60: 100.0}, 58),  # on a straight line, where it crosses 90
        ({20: 95.0, 40: 10.0, 60: 100.0, 80: 100.0}, 40 + 20 * 80 / 90),  # a lucky start does not count
        ({20: 0.0, 40: 100.0, 60: 0.0, 80: 100.0}, 78),
        ({20: 0.0, 40: 0.0}, 20),  # nothing to be reached
    ],
)
def test_effective_length_is_where_the_curve_last_crosses_its_share(curve, expected):
    assert crossing(curve, 0.9) == pytest.approx(expected)


def test_the_length_curve_sees_what_a_model_needs():
    eye = torch.eye(4)
    blind, half, full = torch.ones(4, 4) / 2, eye.clone(), eye
    half[2:] = 0.5
    views = {"whole": full, "20": blind, "40": half, "60": full}
    lengths = torch.full((4, 4), 9)
    lengths[:, 0] = torch.tensor([10, 30, 50, 50])
    dropped = torch.zeros_like(lengths)
    dropped[3] = 20
    given = seen(eye, {name: text[:, None] for name, text in views.items()}, lengths, dropped)
    found = EffectiveLength((20, 40, 60)).read(given).numbers
    assert [found[f"{n}/t2i_r1"] for n in (20, 40, 60)] == [0, 50, 100]
    assert [found[f"{n}/shortened"] for n in (20, 40, 60)] == [75, 50, 25]
    assert found["effective"] == pytest.approx(crossing({20: 0, 40: 50, 60: 100}, 0.95))


def test_order_compares_captions_of_several_sentences_only():
    eye = torch.eye(4)
    swapped = eye[[1, 0, 2, 3]]
    views = {"whole": eye[[0, 1, 2, 0]], "without_first": swapped, "moved": eye, "shuffled": eye}
    lengths = torch.full((4, 4), 9)
    lengths[3, 1:] = 0  # the last caption has one sentence
    found = Order(times=()).read(seen(eye, {name: v[:, None] for name, v in views.items()}, lengths)).numbers
    assert found["captions"] == 3
    assert found["whole/t2i_r1"] == 100
    assert found["without_first/t2i_r1"] == pytest.approx(100 / 3)
    assert found["without_first/lost"] == pytest.approx(200 / 3)
    assert found["moved/lost"] == 0


def test_single_sentences_have_no_order_and_no_parts():
    views = dict.fromkeys(("whole", "without_first", "moved", "shuffled"), torch.eye(2)[:, None])
    given = seen(torch.eye(2), views, torch.tensor([[9, 0, 0, 0]] * 2))
    assert Order(times=()).read(given).numbers == {"captions": 0}
    given = seen(torch.eye(2), {"2": torch.zeros(2, 2, 2)}, torch.zeros(2, 2, dtype=torch.int64))
    assert HiMo((2,)).read(given).numbers == {"2/captions": 0}


def score_of(*cosines):
    """Texts with these cosines to the image (1, 0)."""
    return torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])


def test_himo_counts_strict_rises_and_correlates_longer_rows():
    two = torch.stack([score_of(0.1, 0.2), score_of(0.2, 0.1), score_of(0.3, 0.3), score_of(0.5, 0.9)])
    four = torch.stack(
        [score_of(0.1, 0.2, 0.3, 0.4), score_of(0.4, 0.1, 0.3, 0.0), *[score_of(0.9, 0.1, 0.1, 0.1)] * 2]
    )
    lengths = torch.tensor([[5, 9, 5, 6, 7, 8]] * 4)
    lengths[3, 2:] = 0  # too few sentences for four parts
    image = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    found = HiMo((2, 4)).read(seen(image, {"2": two, "4": four}, lengths))
    assert found.numbers["2/rising"] == 50
    by_numpy = [np.corrcoef(row, range(4))[0, 1] for row in four[:3, :, 0].double().numpy()]
    assert found.numbers["4/captions"] == 3
    assert found.each["4/pearson"].values == pytest.approx(by_numpy)
    assert found.numbers["4/pearson"] == pytest.approx(np.mean(by_numpy))


def test_what_the_context_cuts_off_does_not_raise_the_similarity():
    rounded = torch.stack([score_of(0.3, 0.3 + 1e-6)])
    given = seen(torch.tensor([[1.0, 0.0]]), {"2": rounded}, torch.tensor([[77, 77]]))
    assert HiMo((2,)).read(given).numbers == {"2/captions": 1, "2/rising": 0}


def test_kinds_of_captions_add_up_to_the_whole_set():
    image, text = (F.normalize(torch.randn(30, 6), dim=-1) for _ in range(2))
    text = F.normalize(text + image, dim=-1)
    lengths = torch.randint(10, 77, (30, 1))
    dropped = torch.where(lengths > 70, 100, 0)
    given = seen(image, {"whole": text[:, None]}, lengths, dropped)
    found, whole = ByLength((20, 40, 77)).read(given).numbers, given.hits("whole")
    kinds = {name.split("/")[0] for name in found}
    assert kinds <= {"1-20", "21-40", "41-77", "78-"}
    for name, each in whole.items():
        total = sum(found[f"{kind}/{name}"] * found[f"{kind}/captions"] for kind in kinds)
        assert total / 30 == pytest.approx(np.mean(each.values))
    long = (lengths + dropped > 77)[:, 0]
    assert found["78-/similarity"] == pytest.approx(float((image * text).sum(1)[long].mean()), rel=1e-5)


def test_space_against_naive_loops():
    image, text = (F.normalize(torch.randn(8, 5), dim=-1) for _ in range(2))
    found = Space().read(seen(image, {"whole": text[:, None]})).numbers
    cosine = (image @ text.T).double().numpy()
    assert found["matched"] == pytest.approx(np.diag(cosine).mean(), rel=1e-5)
    assert found["unmatched"] == pytest.approx(cosine[~np.eye(8, dtype=bool)].mean(), rel=1e-5)


def test_truncation_counts_captions_and_tokens():
    given = seen(
        torch.eye(2), {"whole": torch.eye(2)[:, None]}, torch.tensor([[77], [23]]), torch.tensor([[100], [0]])
    )
    assert Truncation().read(given).numbers == {"captions": 50, "tokens": 50}


def test_every_number_is_the_mean_of_its_items(tower, data):
    found = examine(tower, data, {"d": Diagnostics("heldout", PARTS, batch_size=10)})["d"]
    assert {name.split("/")[0] for name in found.numbers} == set(PARTS)
    assert all(math.isfinite(value) for value in found.numbers.values())
    for name, each in found.each.items():
        assert found.numbers[name] == pytest.approx(np.mean(each.values)), name
        assert len(set(each.keys)) == len(each.keys) == len(each.values), name


def test_one_pass_gives_the_numbers_of_retrieval(tower, data):
    views = {str(n): Whole(limit=n) for n in (20, 120)}
    found = examine(tower, data, {
        "d": Diagnostics("heldout", {"length": EffectiveLength((20, 120)), "space": Space()}),
        "r": Retrieval("heldout", views),
    })  # fmt: skip
    for name in ("20/i2t_r1", "20/t2i_r1", "120/i2t_r1", "120/t2i_r1"):
        assert found["d"].numbers[f"length/{name}"] == pytest.approx(found["r"].numbers[name])
        assert found["d"].each[f"length/{name}"] == found["r"].each[name]


def test_a_view_that_parts_share_is_encoded_once(tower, data):
    asked = []
    judge_batches = data.judge_batches
    data.judge_batches = lambda split, size, groups: (
        asked.append(groups) or judge_batches(split, size, groups)
    )
    examine(tower, data, {"d": Diagnostics("heldout", {"a": ByLength(), "b": Space(), "c": Truncation()})})
    assert [groups.count for groups in asked] == [1]


def test_every_file_runs_as_it_is(tower, data, scenes):
    names = ["diagnostics", "concepts", "pointing"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("eval", [f"benchmark=[{','.join(names)}]"])
    found = examine(tower, data, evaluators(config.benchmark))
    assert list(found) == names
    assert set(PARTS) == {name.split("/")[0] for name in found["diagnostics"].numbers}


def test_a_set_of_ones_own_is_diagnosed_under_its_protocol(tower, data, tmp_path):
    BUILDERS["jsonl"](tmp_path)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("eval", [
            "benchmark=[jsonl,diagnostics]", f"benchmark.root={tmp_path}",
            "benchmark.diagnostics.split=${benchmark.jsonl}",
            "+benchmark.jsonl.protocol=ours", "+benchmark.jsonl.expected={images: 3}",
        ])  # fmt: skip
    found = examine(tower, data, evaluators(config.benchmark))
    assert found["diagnostics"].protocol == found["jsonl"].protocol == "ours/raw"
    assert found["diagnostics"].each["length/77/t2i_r1"] == found["jsonl"].each["cut77/t2i_r1"]


def test_beyond_a_short_context_nothing_changes(tiny, scenes):
    tower = DualTower(build(tiny, None, None))
    tower.tokenizer.context_length = 60  # shorter than every paragraph
    parts = {"length": EffectiveLength((40, 77, 248)), "truncation": Truncation(), "himo": HiMo((5,))}
    found = examine(tower, module(scenes, tower), {"d": Diagnostics("heldout", parts)})["d"].numbers
    assert found["truncation/captions"] == 100
    assert found["length/77/shortened"] == 100
    assert found["length/77/t2i_r1"] == found["length/248/t2i_r1"]
