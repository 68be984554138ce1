"""What is said about an export: results of exactly these weights, nothing private, snippets that run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from torch import Tensor

from longclip import export, models
from longclip.export import card, facts
from longclip.export.parity import Row
from longclip.stored import write_share
from longclip.towers.merging import merged_state_dict
from longclip.towers.pretrained import Backbone

CONFIG = {
    "data": {"root": "/home/alice/secret/captions", "url": "https://alice:pass@host/a.tar?token=abc"},
    "model": {"backbone": {"architecture": "ViT-B-16", "weights": None}},
    "recipe": {"captions": {"long": "Whole"}},
    "samples": 640,
    "seed": 1,
    "weights": None,
}
ROWS = [Row("text/1", 1e-7, 1e-5), Row("image/0", 2e-7, 1e-5)]


@pytest.fixture
def run(backbone: Backbone, tmp_path: Path) -> Path:
    """A run directory with a checkpoint, the judgement at it, and an earlier one."""
    folder = tmp_path / "runs" / "mine"
    tensors: dict[str, Tensor] = {
        f"weights/{models.PREFIX}{name}": tensor.detach().clone()
        for name, tensor in merged_state_dict(backbone.model).items()
    }
    own = {"samples_seen": 640, "model_cfg": backbone.model_cfg, "preprocess_cfg": backbone.preprocess_cfg}
    write_share(
        folder / "checkpoints" / "step-000000010.ckpt", 0, 1, tensors, {"global_step": 10, "longclip": own}
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    judged = [{"samples_seen": 0, "dev/long/i2t_r1": 1.5}, {"samples_seen": 640, "dev/long/i2t_r1": 33.25}]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    return folder


@pytest.fixture
def known(run: Path) -> facts.Known:
    return facts.gather(str(run), models.load(str(run)), "fp32")


def judge(run: Path, weights: str, value: float) -> None:
    row = {"benchmark": "coco", "protocol": "coco_val2017", "weights": weights, "numbers": {"i2t_r1": value}}
    (run / "eval").mkdir(exist_ok=True)
    with (run / "eval" / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def test_a_run_says_where_its_weights_come_from(run: Path, known: facts.Known) -> None:
    assert known.provenance["fingerprint"] == models.fingerprint(models.load(str(run)))
    told = {key: known.provenance[key] for key in ("source", "run", "checkpoint", "step", "samples_seen")}
    assert told == {
        "source": "mine",
        "run": "mine",
        "checkpoint": "step-000000010.ckpt",
        "step": 10,
        "samples_seen": 640,
    }


def test_results_are_those_of_these_very_weights(run: Path) -> None:
    backbone = models.load(str(run))
    judge(run, "another", 99.0)
    judge(run, models.fingerprint(backbone), 40.0)
    judge(run, models.fingerprint(backbone), 41.0)
    found = facts.gather(str(run), backbone, "fp32").results
    assert found == [
        facts.Result("dev", "", "long/i2t_r1", 33.25),
        facts.Result("coco", "coco_val2017", "i2t_r1", 41.0),
    ]


def test_what_the_run_judged_with_other_weights_is_left_out(run: Path) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "weights": "ema"}))
    assert facts.gather(str(run), models.load(str(run)), "fp32").results == []


def test_an_export_of_an_export_keeps_what_was_known(backbone: Backbone, tmp_path: Path) -> None:
    folder = export.write(backbone, tmp_path / "first", provenance={"run": "mine", "step": 10})
    again = facts.gather(str(folder), models.load(str(folder)), "bf16").provenance
    assert (again["run"], again["step"], again["dtype"]) == ("mine", 10, "bf16")


def test_nothing_private_is_told(backbone: Backbone, known: facts.Known) -> None:
    text = card.text(known, backbone, "hf", ROWS)
    for secret in ("/home", "alice", "pass@", "token=", "abc"):
        assert secret not in text
    assert "root: captions" in text
    assert "https://host/a.tar" in text


def test_a_card_says_data_recipe_results_and_limits(backbone: Backbone, known: facts.Known) -> None:
    text = card.text(known, backbone, "hf-text", ROWS)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "Use", "Data", "Recipe", "Results", "Limits", "Check", "Provenance",
    ]  # fmt: skip
    for words in (
        "The text tower of a CLIP that reads up to 248 tokens",
        "640 images",
        "architecture: ViT-B-16",
        "| dev | own data | long/i2t\\_r1 | 33.25 |",
        "not been judged under a published protocol",
        "SDXL",
        "| text/1 | 1.0e-07 | 1e-05 |",
        '"step": 10',
    ):
        assert words in text, words


def test_an_unjudged_stranger_is_described_as_one(backbone: Backbone) -> None:
    stranger = facts.Known("<b>x</b>|y", {"dtype": "bf16"}, {}, [])
    text = card.text(stranger, backbone, "open_clip", ROWS)
    assert "These weights have not been judged." in text
    assert "rounded to bf16" in text
    assert "# \\<b\\>x\\</b\\>\\|y" in text


@pytest.mark.parametrize(
    "kind", ["open_clip", "hf", "hf-vision", "hf-text", pytest.param("onnx", marks=pytest.mark.long)]
)
def test_what_a_card_says_to_type_runs(
    backbone: Backbone, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40)).save("photo.jpg")
    export.write(backbone, "DIR", kind)
    text = card.text(facts.Known("mine", {"dtype": "fp32"}, {}, []), backbone, kind, ROWS)
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code
    exec(compile(code[1], kind, "exec"), {})
