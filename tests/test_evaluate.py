"""Judging: the one path from a model over batches to names and numbers."""

import pytest
import torch

from eval import report
from longclip import runs
from longclip.captions import First, Groups, Source, Whole
from longclip.evaluate import Pointing, Retrieval, judge
from longclip.metrics import retrieval
from longclip.types import UserError


def test_retrieval_is_the_metric_of_all_features_whatever_the_batch(tower, data):
    views = {"long": Whole(), "short": First(), "length/20": Whole(limit=20)}
    small = judge(tower, data, {"x": Retrieval("heldout", views, batch_size=5)})
    large = judge(tower, data, {"x": Retrieval("heldout", views, batch_size=24)})
    assert small == pytest.approx(large)
    ((_, batch),) = data.judge_batches("heldout", 24, Groups({"long": Whole()}, seed=0, shuffle=False))
    tower.eval()
    with torch.no_grad():
        found = tower(batch, {"long": slice(0, 1)})
    by_hand = retrieval(found.image_BE, found.text_BKE[:, 0], torch.arange(24))
    assert {name: small[f"x/long/{name}"] for name in by_hand} == pytest.approx(by_hand)
    assert small["x/length/20/i2t_r1"] != small["x/long/i2t_r1"] or small["x/length/20/t2i_median"]


def test_judging_restores_training_and_leaves_no_gradients(tower, data):
    tower.train()
    judge(tower, data, {"x": Retrieval("heldout")})
    assert tower.training
    assert all(p.grad is None for p in tower.parameters())


def test_pointing_of_a_model_that_reads_nothing_is_near_chance(tower, data):
    found = judge(tower, data, {"p": Pointing("heldout")})
    assert 0 < found["p/chance"] < 60
    assert 0 <= found["p/accuracy"] <= 100


def test_a_view_without_captions_is_a_sentence(tower, data):
    with pytest.raises(UserError, match="no caption for the view 'raw'"):
        judge(tower, data, {"x": Retrieval("heldout", {"raw": Source("nobody")})})


def test_the_length_curve_is_read_from_the_names():
    found = {"scenes/length/77/i2t_r1": 40.0, "scenes/length/77/t2i_r1": 60.0, "scenes/length/20/i2t_r1": 1.0,
             "scenes/length/20/t2i_r1": 3.0, "scenes/long/i2t_r1": 90.0}  # fmt: skip
    assert report.length_curves(found) == {"scenes": {20: 2.0, 77: 50.0}}


def test_a_torn_line_of_judgements_is_passed_over(tmp_path):
    runs.record(tmp_path, 0, {"a/i2t_r1": 1.0})
    runs.record(tmp_path, 64, {"a/i2t_r1": 2.0})
    with open(tmp_path / "judgements.jsonl", "a") as f:
        f.write('{"samples_seen": 128, "a/i')
    assert [row["samples_seen"] for row in runs.judgements(tmp_path)] == [0, 64]
