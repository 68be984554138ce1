"""Teacher embeddings: what is stored is what the model says, and a recipe finds that of its own captions."""

import json

import hydra
import pytest
import torch
from safetensors.torch import save_file

from conf import launch
from conf.launch import CONF
from longclip import cli
from longclip.captions import Groups, Whole
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.data.sidecars.joining import Join
from longclip.data.sidecars.store import Store, digests
from longclip.data.tars import dataset, shards
from longclip.embedding import embed
from longclip.objectives.distilled import Distilled, Teacher
from longclip.sentences import parse
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import Record, UserError


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A model in a folder, and a tower of it."""
    torch.manual_seed(1)
    backbone, folder = build(tiny, None, None), tmp_path_factory.mktemp("teacher")
    config = {"model_cfg": backbone.model_cfg, "preprocess_cfg": backbone.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(backbone.model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder), DualTower(backbone).eval()


def several(scenes, folder, tokenizer):
    """The first scenes with a second caption of the same source and one of another, on every third."""
    data = dataset.Dataset(scenes / "heldout", tokenizer)

    def records():
        for n in range(9):
            record = data.record(n)
            again = parse(f"Scene number {n}.", "llama3.1", tokenizer)
            yield Record(
                f"k{n}", record.image, record.extension, (*record.captions, again)[: 1 + (n % 3 > 0)]
            )

    shards.write(records(), folder, samples_per_shard=9, tokenizer_hash=tokenizer.name_hash)
    return str(folder), data.record(0).captions[0].source


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_recipe_finds_the_embeddings_of_its_own_images_and_captions(teacher, scenes, tmp_path, batch_size):
    name, tower = teacher
    seen = []
    report = embed(
        name, str(scenes / "train"), tmp_path / "out", lambda *at: seen.append(at), batch_size=batch_size
    )
    assert (report.written.rows, report.damaged, seen[-1]) == (96, 0, (96, 96))
    assert report.scale == pytest.approx(tower.backbone.logit_scale.exp().item())
    groups = Groups({"long": Whole()}, seed=3)
    data = DataModule(
        root=scenes, train="train", judge=[], plan=Plan(96, 12), groups=groups, workers=0,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg,
        sidecar=Join([str(tmp_path / "out")], columns=[report.image, *report.texts]),
    )  # fmt: skip
    batch = data.probe(12)
    with torch.no_grad():
        found = tower(batch, groups.slots)
        told = Distilled("long", {"it": Teacher(report.image, report.texts, report.scale)})(found)
    torch.testing.assert_close(batch.columns["teacher_image"], found.image_BE, atol=2e-6, rtol=0)
    torch.testing.assert_close(batch.columns["teacher_text"], found.text_BKE[:, 0], atol=2e-6, rtol=0)
    assert told.value.abs() < 1e-5, "a model is its own teacher"
    assert told.measures["taught"] == 1


def test_every_source_is_a_column_and_a_caption_that_is_missing_stays_so(teacher, scenes, tmp_path):
    name, tower = teacher
    data, first = several(scenes, tmp_path / "data", tower.tokenizer)
    report = embed(name, data, tmp_path / "out", name="t", sources=[first, "llama3.1"])
    assert report.texts == [f"t_text_{first}", "t_text_llama3_1"]
    assert report.written.missing == {"t_image": 0, report.texts[0]: 0, "t_text_llama3_1": 3}
    store = Store(tmp_path / "out")
    (row,) = store.rows(digests(["k4"])).tolist()
    with torch.no_grad():
        wanted = tower.encode_captions(["Scene number 4."])[0]
    torch.testing.assert_close(torch.tensor(store.vector("t_text_llama3_1", row)), wanted, atol=2e-6, rtol=0)
    (bare,) = store.rows(digests(["k3"])).tolist()
    assert len(store.vector("t_text_llama3_1", bare)) == 0


def test_captions_that_training_shows_in_turn_are_refused(teacher, scenes, tmp_path):
    name, tower = teacher
    data, first = several(scenes, tmp_path / "data", tower.tokenizer)
    with pytest.raises(
        UserError, match=rf"'k1' has 2 captions \({first}, llama3.1\).*--source NAME"
    ) as caught:
        embed(name, data, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "my.t", "sources": ["llama3.1"]}, r"column 'my.t_image' cannot name a file.*--name NAME"),
        ({"sources": ["a.b", "a_b"]}, r"--source a.b and --source a_b make one column, teacher_text_a_b"),
    ],
)
def test_columns_that_cannot_be_are_refused_before_anything_is_computed(
    teacher, scenes, tmp_path, options, message
):
    data, _ = several(scenes, tmp_path / "data", teacher[1].tokenizer)
    seen = []
    with pytest.raises(UserError, match=message):
        embed(teacher[0], data, tmp_path / "out", lambda *at: seen.append(at), **options)
    assert not seen


def test_a_damaged_image_is_left_out(teacher, scenes, tmp_path, monkeypatch):
    real = dataset.Dataset.record

    def broken(self, index):
        record = real(self, index)
        return record._replace(image=record.image[:50]) if index == 7 else record

    monkeypatch.setattr(dataset.Dataset, "record", broken)
    report = embed(teacher[0], str(scenes / "heldout"), tmp_path / "out")
    assert (report.written.rows, report.damaged) == (23, 1)


def test_the_command_says_what_to_type_next(teacher, scenes, tmp_path, capsys):
    command = [
        "embed",
        teacher[0],
        str(scenes / "heldout"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "24 images, 0 damaged ones left out" in printed
    assert "captions were read up to 248 tokens" in printed
    assert f"data.root={scenes} data.train=heldout" in printed
    assert "columns=[teacher_image,teacher_text]" in printed
    assert "teachers.first.scale=14.29" in printed
    assert cli.main(command) == 2
    assert "already exists" in capsys.readouterr().err


def test_what_to_type_next_reads_the_columns_that_were_made(teacher, scenes, tmp_path, capsys):
    data, _ = several(scenes, tmp_path / "data", teacher[1].tokenizer)
    command = ["embed", teacher[0], data, "--out", str(tmp_path / "out"), "--device", "cpu", "--name", "t"]
    assert cli.main([*command, "--source", "another"]) == 2
    assert "the source 'another'; theirs are of llama3.1, " in capsys.readouterr().err
    assert cli.main([*command, "--source", "llama3.1"]) == 0
    _, _, typed = capsys.readouterr().out.partition("next: python train.py ")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", typed.split())
    term = config.recipe.terms.distilled.teachers.first
    assert (term.image, term.text) == ("t_image", "t_text") == tuple(config.data.sidecar.columns)
    assert launch.instantiate(config.recipe.captions.long) == Whole("llama3.1")
