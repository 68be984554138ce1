"""`python -m eval.run`: several sets at once, results kept, and checked against what was trained on."""

import json
import logging
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from eval.own import judged_as_trained
from eval.run import evaluate
from longclip import export
from longclip.data.tars.dataset import Dataset
from longclip.towers.pretrained import build
from longclip.types import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose(*overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("eval", list(overrides))


@pytest.fixture
def run(tiny, scenes, tmp_path):
    """A run with an export: what `eval.run model=` may name."""
    run = tmp_path / "runs" / "mine"
    export.write(build(tiny, None, 248), run / "export")
    config = {"data": {"root": str(scenes), "train": {"own": {"folder": "train"}}}}
    OmegaConf.save(config, run / "config.yaml")
    return run


def listing(folder, records):
    """A folder of one's own, of records that shards hold."""
    folder.mkdir()
    lines = []
    for record in records:
        (folder / f"{record.key}.{record.extension}").write_bytes(record.image)
        captions = [caption.text for caption in record.captions]
        lines.append(json.dumps({"image": f"{record.key}.{record.extension}", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_several_sets_are_judged_at_once_and_only_what_is_needed_is_made(run, scenes, tmp_path):
    heldout = Dataset(scenes / "heldout")
    own = listing(tmp_path / "own", [heldout.record(n) for n in range(6)])
    numbers = evaluate(compose(
        f"source={run}/export", "benchmark=[jsonl,none]", f"benchmark.root={own}", "report=false",
        f"data.root={tmp_path}/never",
    ))  # fmt: skip
    assert not (tmp_path / "never").exists()
    assert numbers["jsonl/captions/i2t_queries"] == 6
    written = json.loads((run / "export/eval/metrics.json").read_text())
    assert written["jsonl/captions/t2i_r5"] == numbers["jsonl/captions/t2i_r5"]
    line = json.loads((run / "export/eval/results.jsonl").read_text())
    assert (line["benchmark"], line["protocol"], line["context_length"]) == ("jsonl", "", 248)
    assert line["seconds"] > 0
    assert line["settings"]["root"] == str(own)


def test_what_was_trained_on_is_told(run, scenes, tmp_path, caplog):
    train, heldout = Dataset(scenes / "train"), Dataset(scenes / "heldout")
    namesake = heldout.record(0)._replace(key=train.record(5).key)
    own = listing(tmp_path / "own", [*(train.record(n) for n in range(2)), heldout.record(1), namesake])
    config = [f"source={run}/export", "benchmark=jsonl", f"benchmark.root={own}", "report=false"]
    with caplog.at_level(logging.WARNING):
        numbers = evaluate(compose(*config))
    assert numbers["jsonl/overlap"] == 50
    assert (
        "jsonl: 2 of its 4 images (50.0 %) were trained on, such as train-000000, train-000001" in caplog.text
    )
    assert evaluate(compose(*config, f"overlap={scenes}/heldout"))["jsonl/overlap"] == 25
    (run / "config.yaml").unlink()
    assert "jsonl/overlap" not in evaluate(compose(*config))


def test_a_mistyped_folder_of_training_data_costs_no_judging():
    with pytest.raises(UserError, match="no/shards"):
        evaluate(compose("source=no/model", "benchmark=none", "overlap=no/shards"))


TRAINED = {
    "data": {
        "_target_": "longclip.data.module.DataModule",
        "root": "mine",
        "judge": ["dev"],
        "prepare": None,
    },
    "benchmark": {"shards": {"split": "dev", "views": {"long": 1}}},
}


def of_run(tmp_path, *typed, config=TRAINED):
    (tmp_path / "mine").mkdir(exist_ok=True)
    OmegaConf.save(config, tmp_path / "mine" / "config.yaml")
    typed = [f"source={tmp_path}/mine/export", *typed]
    found = judged_as_trained(compose(*typed), typed)
    return OmegaConf.to_container(found, resolve=True)


def test_a_run_is_judged_on_what_it_was_judged_on_in_training(tmp_path):
    found = of_run(tmp_path)
    assert {part: found[part] for part in ("data", "benchmark")} == TRAINED
    assert found["batch_size"] == 128, "all else as it was composed"
    found = of_run(tmp_path, "data.root=moved", "data.prepare=null", "++benchmark.shards.batch_size=7")
    assert found["data"] == TRAINED["data"] | {"root": "moved", "prepare": None}
    assert found["benchmark"] == {"shards": TRAINED["benchmark"]["shards"] | {"batch_size": 7}}


def test_what_is_chosen_to_judge_on_wins_over_the_run(tmp_path):
    assert of_run(tmp_path, "data=scenes")["data"]["root"] == "datasets/scenes"
    docci = of_run(tmp_path, "benchmark=docci")
    assert (docci["data"]["root"], set(docci["benchmark"])) == ("datasets/scenes", {"docci"})
    late = of_run(tmp_path, "benchmark=late")
    assert late["data"] == TRAINED["data"], "a benchmark of splits finds those of the run"
    assert late["benchmark"]["late"]["split"] == "dev"
    scenes = of_run(tmp_path, "benchmark=[scenes,late]")
    assert scenes["data"]["root"] == "datasets/scenes", "the run has no such splits"


@pytest.mark.parametrize(
    ("typed", "config", "words"),
    [
        (["data.workers=0"], TRAINED, "data.workers is no key of what the run was judged on"),
        ([], {"data": {}}, "does not say what its run was judged on"),
        ([], TRAINED | {"benchmark": {}}, "trained with benchmark=none"),
    ],
)
def test_a_run_that_cannot_say_what_it_was_judged_on(tmp_path, typed, config, words):
    with pytest.raises(UserError, match=words):
        of_run(tmp_path, *typed, config=config)


def test_jsonl_without_a_folder_says_which_key_is_missing(run):
    from conf.launch import explain

    with pytest.raises(Exception, match="root") as refused:
        evaluate(compose(f"source={run}/export", "benchmark=jsonl"))
    assert explain(refused.value, "eval").startswith("Missing mandatory value: benchmark.root")
