"""What goes to Weights & Biases, read back from the file that it keeps off line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import project
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from longclip import runs, stored
from longclip.gallery import Failure, Gallery, Pointed, Way
from longclip.loggers import Wandb


def png(colour):
    written = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(written, "PNG")
    return written.getvalue()


def shown():
    by_text = Failure(7, "k1", png("red"), "A red dog.", "k2", png("blue"), None)
    by_image = Failure(2, "k1", png("red"), "A red dog.", "k2", None, "A blue dog.")
    pointed = Pointed("k1", 7, png("red"), ["A dog.", "It is wet."], [0.5, 0.25], torch.rand(2, 2, 2))
    return Gallery("scenes", "long", Way(9, 9, 8, [by_text]), Way(9, 9, 8, [by_image]), [pointed])


def started(run, first, last):
    """What a start of training logs."""
    logger = Wandb(str(run), name="mine", project="longclip", offline=True)
    logger.log_hyperparams({"optim": {"lr": 1e-3}, "samples": last})
    for step in range(first, last):
        logger.log_metrics({"train/loss": 10.0 - step}, step=step)
    logger.log_galleries([shown()], step=last - 1)
    logger.finalize("success")


def records(run, number):
    """Every record of the file of a start."""
    (path,) = sorted((run / "wandb").glob("offline-run-*"))[number].glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(found, kind):
    return [record[kind] for record in found if record["type"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two starts of one run, the second of which goes on."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    checkpoint = folder / "checkpoints" / runs.checkpoint_name(5)
    stored.write_share(checkpoint, 0, 1, {"weights/x": torch.zeros(2)}, {})
    runs.record(folder, 320, {"scenes/long/i2t_r1": 50.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder.parent / "home"))
        started(folder, 0, 3)
        started(folder, 3, 5)
    return folder


@pytest.fixture(scope="module")
def starts(run):
    return [records(run, 0), records(run, 1)]


def test_all_starts_are_one_run(run, starts):
    ids = {of_kind(start, "run")[0]["run_id"] for start in starts}
    assert ids == {(run / "wandb_id").read_text()}


def test_the_config_is_that_of_each_start(starts):
    configs = [of_kind(start, "config")[0]["update"] for start in starts]
    assert configs == [{"optim": {"lr": 1e-3}, "samples": samples} for samples in (3, 5)]


def test_curves_go_on_over_the_steps_of_training(starts):
    rows = [row["item"] for start in starts for row in of_kind(start, "history")]
    drawn = [(row["trainer/global_step"], row["_step"], row["train/loss"]) for row in rows]
    assert drawn == [(step, step, 10.0 - step) for step in range(5)]


class Table:
    """The last such table of a start, as an upload would find it: rows, and the files that they name."""

    def __init__(self, start, name):
        contents = [one["manifest"]["contents"] for one in of_kind(start, "artifact")]
        *_, self.files = [
            {entry["path"]: Path(entry["local_path"]) for entry in entries}
            for entries in contents
            if any(entry["path"] == f"{name}.table.json" for entry in entries)
        ]
        content = json.loads(self.files[f"{name}.table.json"].read_text())
        self.rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def picture(self, cell):
        return Image.open(self.files[cell["path"]]).convert("RGB")


def test_tables_hold_what_failed_with_pictures(starts):
    for start in starts:
        shown = Table(start, "gallery/scenes")
        by_text, by_image = shown.rows
        assert (by_text["asked by"], by_text["rank"], by_text["of"]) == ("text", 7, 9)
        assert (by_image["asked by"], by_image["text"], by_image["text first"]) == (
            "image",
            "A red dog.",
            "A blue dog.",
        )
        assert by_image["image first"] is None
        assert shown.picture(by_text["right image"]).getpixel((5, 5)) == (255, 0, 0)
        assert shown.picture(by_text["image first"]).getpixel((5, 5)) == (0, 0, 255)


def test_maps_lie_over_their_picture(starts):
    table = Table(starts[1], "heat/scenes")
    assert [(row["sentence"], row["cosine"]) for row in table.rows] == [("A dog.", 0.5), ("It is wet.", 0.25)]
    shown = [table.picture(row["map"]) for row in table.rows]
    assert all(one.size == (24, 24) for one in shown)
    assert shown[0].tobytes() != shown[1].tobytes()
    assert len(shown[0].getcolors()) > 4


def test_everything_that_is_off_line_lies_in_the_run(run, starts):
    for name in ("gallery/scenes", "heat/scenes"):
        for start in starts:
            assert all(path.is_relative_to(run) for path in Table(start, name).files.values())


def test_the_checkpoint_is_named_and_not_uploaded(run, starts):
    kept = [one for start in starts for one in of_kind(start, "artifact") if one["type"] == "model"]
    assert len(kept) == 2
    (entry,) = kept[-1]["manifest"]["contents"]
    assert entry["ref"].startswith((run / "checkpoints" / runs.checkpoint_name(5)).as_uri())
    assert "local_path" not in entry
    assert json.loads(kept[-1]["metadata"]) == {"samples_seen": 320, "scenes/long/i2t_r1": 50.0}


def test_processes_but_the_first_log_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    started(tmp_path / "mine", 0, 2)
    assert not (tmp_path / "mine").exists()


@pytest.mark.long
def test_a_training_and_its_resume_are_one_run_with_everything_in_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Absolute: wandb's service may have been started elsewhere.
    small = (*project.SMALL, *project.SCENES, f"runs={tmp_path}", "logger=wandb", "judge.gallery=2")
    with project.inside(tmp_path):
        for more in (["samples=8"], ["samples=16", "resume=auto"]):
            project.typed("python train.py name=mine", *small, *more)
    run = tmp_path / "mine"
    first, second = (records(run, number) for number in (0, 1))
    ids = {of_kind(start, "run")[0]["run_id"] for start in (first, second)}
    assert ids == {(run / "wandb_id").read_text()}
    assert of_kind(second, "config")[0]["update"]["recipe"]["terms"]
    rows = [[row["item"] for row in of_kind(start, "history")] for start in (first, second)]
    losses = [[row["trainer/global_step"] for row in start if "train/loss" in row] for start in rows]
    assert losses == [[0, 1], [2, 3]]
    for start in (first, second):
        shown = Table(start, "heat/scenes")
        assert shown.picture(shown.rows[0]["map"]).size == (24, 24)
    assert [one for one in of_kind(second, "artifact") if one["type"] == "model"]
