"""Exports: open_clip alone opens them and gives the same features; what cannot be expressed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from towers import formats

from longclip import export, parity
from longclip.towers.pretrained import Backbone, build
from longclip.types import UserError


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    formats.register(tmp_path_factory.mktemp("configs"))


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    """As training leaves it: stretched, frozen head, QuickGELU, patch dropout."""
    file = formats.openai_archive(formats.model("tiny-quickgelu"), tmp_path / "ViT.pt")
    return build("tiny", str(file), 248, freeze_positions=True, patch_dropout=0.25)


def test_open_clip_alone_gives_the_same_features(backbone: Backbone, tmp_path: Path) -> None:
    directory = export.export_open_clip(backbone, tmp_path / "out" / "export", {"run": "demo"})
    assert sorted(path.name for path in directory.iterdir()) == sorted([export.CONFIG, export.WEIGHTS])
    found = parity.verify(backbone, directory)
    assert found.keys() == {f"text/{n}" for n in (1, 76, 77, 248, 400)} | {"image/0", "image/1"}
    assert max(found.values()) <= 1e-5


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_other_features_are_an_error(
    backbone: Backbone, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {"text": torch.full((5, 16), 0.25), "image": torch.full((2, 16), 0.25)}
    monkeypatch.setattr(parity, "_open_elsewhere", lambda *_: theirs)
    ours = theirs["text"].clone()
    ours[2, 0] = wrong
    encode = {"encode_text": lambda _: ours, "encode_image": lambda _: theirs["image"]}
    with pytest.raises(UserError, match=r"other features than the model it came from: text/77 by [^,]*$"):
        parity.verify(backbone, "anywhere", **encode)


def test_the_folder_says_what_the_model_is(backbone: Backbone, tmp_path: Path) -> None:
    directory = export.export_open_clip(backbone, tmp_path / "export", {"run": "demo"})
    config = json.loads((directory / export.CONFIG).read_text())
    assert config["longclip"] == {"run": "demo"}
    assert config["model_cfg"]["quick_gelu"] is True
    assert config["model_cfg"]["text_cfg"]["context_length"] == 248
    assert "patch_dropout" not in config["model_cfg"]["vision_cfg"]
    assert config["preprocess_cfg"].keys() == {"mean", "std", "interpolation", "resize_mode"}
    tensors = load_file(directory / export.WEIGHTS)
    assert tensors.keys() == formats.model("tiny").state_dict().keys()
    assert torch.equal(tensors["positional_embedding"], backbone.model.positional_embedding)
    again = build(None, f"local-dir:{directory}", 248)
    assert again.preprocess_cfg == backbone.preprocess_cfg


def test_a_second_export_replaces_the_first(backbone: Backbone, tmp_path: Path) -> None:
    export.export_open_clip(backbone, tmp_path / "export")
    with torch.no_grad():
        backbone.model.logit_scale.fill_(1.5)
    export.export_open_clip(backbone, tmp_path / "export")
    assert load_file(tmp_path / "export" / export.WEIGHTS)["logit_scale"] == 1.5


def test_everything_that_cannot_be_expressed_is_listed(backbone: Backbone, tmp_path: Path) -> None:
    backbone.model.pool = nn.Linear(2, 2)
    backbone.model.transformer.resblocks[0].mlp.gelu = nn.GELU()
    backbone.model.ln_final.bias.data[0] = float("nan")
    backbone.model_cfg["text_cfg"]["context_length"] = 77
    with pytest.raises(UserError) as error:
        export.export_open_clip(backbone, tmp_path / "export")
    lines = str(error.value).splitlines()[1:]
    for words in (
        "context_length 77, the tokenizer cuts at 248",
        "module pool (Linear) has no place",
        "resblocks.0.mlp.gelu is a GELU, model_cfg makes it a QuickGELU",
        "tensor pool.weight has no place",
        "positional_embedding is [248, 64] where model_cfg makes it [77, 64]",
        "ln_final.bias holds NaN",
    ):
        assert any(words in line for line in lines), words
    assert not (tmp_path / "export").exists()


def test_a_full_disk_leaves_no_half_export(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.export_open_clip(backbone, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        export.export_open_clip(backbone, tmp_path)
    assert build(None, f"local-dir:{tmp_path}", 248).model is not None


def test_imported_long_clip_keeps_its_features(tmp_path: Path) -> None:
    source = formats.model("tiny-quickgelu", force_context_length=248)
    file = formats.long_clip(source, tmp_path / "longclip.pt")
    directory = export.import_weights(str(file), tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{directory}").eval()
    ids_SL = torch.randint(1, 49407, (2, 248))
    with torch.no_grad():
        assert torch.equal(theirs.encode_text(ids_SL), source.encode_text(ids_SL))
    assert len(json.loads((directory / export.CONFIG).read_text())["longclip"]["sha256"]) == 64


def test_imported_openai_archives_are_stretched_on_request(tmp_path: Path) -> None:
    file = formats.openai_archive(formats.model("tiny"), tmp_path / "ViT.pt")
    for context_length, rows in ((None, 77), (248, 248)):
        directory = export.import_weights(str(file), tmp_path / str(rows), context_length=context_length)
        assert load_file(directory / export.WEIGHTS)["positional_embedding"].shape[0] == rows
