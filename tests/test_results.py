"""What judging leaves behind: read again as it was, of one model alone, and under others' names, too."""

import json

import pytest
import torch
from torch.nn import functional as F

from eval import results
from eval.results import Facts
from longclip import metrics
from longclip.evaluate import Each, Findings
from longclip.types import UserError

FACTS = Facts("runs/mine", "abc123", 248, {"urban": {"split": "test"}}, {"urban": 1.5})


def findings(right=(100.0, 0.0), protocol="urban1k/first-line"):
    each = {f"long/{way}_r1": Each(["a#0", "b#0"], list(right)) for way in ("i2t", "t2i")}
    numbers = {"long/i2t_r1": sum(right) / 2, "long/t2i_r1": sum(right) / 2, "long/i2t_median": 1.5}
    return Findings(numbers, protocol, each)


def test_what_is_written_is_read_again(tmp_path):
    written = results.write(tmp_path, {"urban": findings()}, FACTS)
    assert results.load(tmp_path) == written
    one = written["urban"]
    assert (one.protocol, one.model, one.weights) == ("urban1k/first-line", "runs/mine", "abc123")
    assert one.seconds == 1.5
    assert one.settings == {"split": "test"}


def test_the_log_only_grows_and_every_line_stands_alone(tmp_path):
    results.write(tmp_path, {"urban": findings()}, FACTS)
    before = (tmp_path / "results.jsonl").read_bytes()
    results.write(tmp_path, {"urban": findings((0.0, 0.0)), "own": findings(protocol="")}, FACTS)
    after = (tmp_path / "results.jsonl").read_bytes()
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.decode().splitlines()]
    found = [(row["benchmark"], row["numbers"]["long/i2t_r1"]) for row in rows]
    assert found == [("urban", 50.0), ("urban", 0.0), ("own", 50.0)]
    wanted = {"protocol", "weights", "model", "context_length", "settings", "seconds", "when", "version"}
    assert all(wanted <= row.keys() and "each" not in row for row in rows)


def test_benchmarks_gather_for_one_model_and_never_for_two(tmp_path):
    results.write(tmp_path, {"urban": findings()}, FACTS)
    results.write(tmp_path, {"own": findings()}, FACTS)
    assert list(results.load(tmp_path)) == ["urban", "own"]
    results.write(tmp_path, {"own": findings()}, Facts("runs/mine", "other", 248))
    assert list(results.load(tmp_path)) == ["own"]
    metrics_there = json.loads((tmp_path / "metrics.json").read_text())
    assert not any(name.startswith("urban/") for name in metrics_there)
    assert "weights: other" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("spoilt", ['{"urban": {', '{"own": {"keys": [], "each": {}, "new": 1}}'])
def test_what_was_judged_is_kept_though_the_old_details_cannot_be_read(tmp_path, caplog, spoilt):
    (tmp_path / "details.json").write_text(spoilt)
    written = results.write(tmp_path, {"urban": findings()}, FACTS)
    assert results.load(tmp_path) == written
    assert json.loads((tmp_path / "results.jsonl").read_text())["benchmark"] == "urban"
    assert (tmp_path / "details.json.unreadable").read_text() == spoilt
    assert f"{tmp_path}/details.json.unreadable" in caplog.text


def test_keys_that_numbers_share_are_written_once(tmp_path):
    results.write(tmp_path, {"urban": findings()}, FACTS)
    assert (tmp_path / "details.json").read_text().count("a#0") == 1


def their_recall(scores_TI, positive_TI, k):
    """CLIP_benchmark's recall@k: right ones among the first k of each row, over all right ones of the row."""
    top_TIK = F.one_hot(scores_TI.topk(k, dim=1).indices, scores_TI.shape[1])
    found_TI = top_TIK.sum(1) * positive_TI
    return float(((found_TI.sum(1) / positive_TI.sum(1)) > 0).double().mean())


def test_their_names_carry_their_numbers():
    image_NE = F.normalize(torch.randn(12, 6), dim=1)
    owner_M = torch.arange(12).repeat_interleave(3)
    text_ME = F.normalize(image_NE[owner_M] + torch.randn(36, 6), dim=1)
    ours = {f"coco/{name}": value for name, value in metrics.retrieval(image_NE, text_ME, owner_M).items()}
    theirs = results.clip_benchmark(ours)
    scores_TI, positive_TI = text_ME @ image_NE.T, F.one_hot(owner_M)
    for k in (1, 5, 10):
        assert theirs[f"coco/image_retrieval_recall@{k}"] == pytest.approx(
            their_recall(scores_TI, positive_TI, k)
        )
        assert theirs[f"coco/text_retrieval_recall@{k}"] == pytest.approx(
            their_recall(scores_TI.T, positive_TI.T, k)
        )
    assert len(theirs) == 6


def test_results_lie_beside_a_run_or_an_export_and_never_in_a_checkpoint(tmp_path):
    (tmp_path / "step-000000002.ckpt").mkdir()
    assert results.folder_of(str(tmp_path)) == tmp_path / "eval"
    assert results.folder_of(f"local-dir:{tmp_path}") == tmp_path / "eval"
    for name in (str(tmp_path / "step-000000002.ckpt"), "ViT-B-16/openai", "hf-hub:a/b", "../.."):
        assert results.folder_of(name).parent.as_posix() in ("runs/eval", f"{name}"), name
    assert results.folder_of("ViT-B-16/openai").name == "ViT-B-16-openai"


def test_a_model_without_results_and_damaged_ones_are_sentences(tmp_path):
    with pytest.raises(UserError, match="no results to compare"):
        results.find(str(tmp_path))
    (tmp_path / "details.json").write_text('{"urban": {"benchmark": "urban"}}')
    with pytest.raises(UserError, match=r"details\.json cannot be read"):
        results.load(results.find(str(tmp_path)))
