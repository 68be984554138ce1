"""Exports: the libraries they are for give the same ids and features; what cannot be expressed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from towers import formats

from longclip import export
from longclip.export import FORMATS, folders, huggingface, openclip, parity
from longclip.towers.pretrained import Backbone, build
from longclip.types import UserError

TEXTS = {f"text/{n}" for n in (1, 76, 77, 248, 400)}
IMAGES, PICTURES = {"image/0", "image/1"}, {"picture/0", "picture/1"}


@pytest.fixture
def any_clip_l(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny text tower pass for the one of ViT-L-14, but for its embedding (16) and width (64)."""
    monkeypatch.setattr(huggingface, "CLIP_L", {"width": 64, "heads": 1, "layers": 2})


@pytest.fixture
def square() -> Backbone:
    """A tiny model whose embedding is as wide as its text tower, as that of ViT-L-14."""
    config = {**formats.TINY, "embed_dim": 64, "quick_gelu": True}
    config["text_cfg"] = {**config["text_cfg"], "context_length": 248}
    model = open_clip.CLIP(**config).eval()
    return Backbone(model, config, {**PREPROCESS, "size": 32}, TOKENIZER)


PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
TOKENIZER = export.model.Tokenizer(open_clip.tokenizer.SimpleTokenizer(), 248)


def names(rows: list[parity.Row]) -> set[str]:
    return {row.name for row in rows}


def test_open_clip_without_longclip_gives_the_same_features(backbone: Backbone, tmp_path: Path) -> None:
    directory = export.write(backbone, tmp_path / "out" / "export", provenance={"run": "demo"})
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted([openclip.CONFIG, openclip.WEIGHTS])
    rows = parity.verify(backbone, "open_clip", directory)
    assert names(rows) == TEXTS | IMAGES | PICTURES
    assert max(row.difference for row in rows) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("kind", ["hf", "onnx"])  # the parts of hf: below, in this process
def test_the_library_without_longclip_gives_the_same_features(
    backbone: Backbone, kind: str, tmp_path: Path
) -> None:
    parity.verify(backbone, kind, export.write(backbone, tmp_path / "export", kind))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hf", TEXTS | IMAGES | PICTURES),
        ("hf-vision", IMAGES | PICTURES),
        ("hf-text", TEXTS),
    ],
)
@pytest.mark.usefixtures("here")
def test_every_format_gives_the_same_ids_and_features(
    backbone: Backbone, kind: str, expected: set[str], tmp_path: Path
) -> None:
    rows = parity.verify(backbone, kind, export.write(backbone, tmp_path / "export", kind))
    assert names(rows) == expected
    exact = [row for row in rows if not row.name.startswith("picture")]
    assert max(row.difference for row in exact) <= 1e-5
    assert {row.accepted for row in exact} == {1e-5}


@pytest.mark.usefixtures("here", "any_clip_l")
def test_a_single_file_is_the_text_tower_that_its_loaders_build(square: Backbone, tmp_path: Path) -> None:
    directory = export.write(square, tmp_path / "export", "clip_l", provenance={"run": "demo"})
    assert [path.name for path in directory.iterdir()] == ["clip_l.safetensors"]
    assert names(parity.verify(square, "clip_l", directory)) == TEXTS


@pytest.mark.parametrize(("kind", "dtype"), [("open_clip", "bf16"), ("hf", "fp16")])
@pytest.mark.usefixtures("here")
def test_half_precision_halves_the_file_and_moves_features_a_little(
    backbone: Backbone, kind: str, dtype: str, tmp_path: Path
) -> None:
    directory = export.write(backbone, tmp_path / "export", kind, dtype)
    file = directory / ("model.safetensors" if kind == "hf" else openclip.WEIGHTS)
    assert {tensor.dtype for tensor in load_file(file).values()} == {export.DTYPES[dtype]}
    rows = parity.verify(backbone, kind, directory, dtype)
    assert 1e-5 < max(row.difference for row in rows) <= parity.HALF[dtype]


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_other_features_are_an_error(
    backbone: Backbone, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(kind: str, directory: Path, shown: parity.Shown) -> dict[str, Tensor]:
        text_SE = shown.text_SE.clone()
        text_SE[2, 0] += wrong
        return {"text": text_SE, "image": shown.image_BE}

    monkeypatch.setattr(parity, "_open_elsewhere", changed)
    with pytest.raises(UserError, match=r"other features than the model it came from: text/77 by [^,]*$"):
        parity.verify(backbone, "open_clip", "anywhere")


def test_other_ids_are_an_error(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(kind: str, directory: Path, shown: parity.Shown) -> dict[str, Tensor]:
        ids = [[*ids, *[0] * (248 - len(ids))] for ids in shown.ids]
        ids[1][3] += 1
        return {"ids": torch.tensor(ids), "text": shown.text_SE}

    monkeypatch.setattr(parity, "_open_elsewhere", changed)
    with pytest.raises(UserError, match="other ids than the model was trained on, first for a caption of 76"):
        parity.verify(backbone, "hf-text", "anywhere")


def test_the_folder_says_what_the_model_is(backbone: Backbone, tmp_path: Path) -> None:
    directory = export.write(backbone, tmp_path / "export", provenance={"run": "demo"})
    config = json.loads((directory / openclip.CONFIG).read_text())
    assert config["longclip"] == {"run": "demo"}
    assert config["model_cfg"]["quick_gelu"] is True
    assert config["model_cfg"]["text_cfg"]["context_length"] == 248
    assert "patch_dropout" not in config["model_cfg"]["vision_cfg"]
    assert config["preprocess_cfg"].keys() == {"mean", "std", "interpolation", "resize_mode"}
    tensors = load_file(directory / openclip.WEIGHTS)
    assert tensors.keys() == formats.model("tiny").state_dict().keys()
    assert torch.equal(tensors["positional_embedding"], backbone.model.positional_embedding)
    again = build(None, f"local-dir:{directory}", 248)
    assert again.preprocess_cfg == backbone.preprocess_cfg


def test_a_second_export_replaces_the_first(backbone: Backbone, tmp_path: Path) -> None:
    export.write(backbone, tmp_path / "export")
    with torch.no_grad():
        backbone.model.logit_scale.fill_(1.5)
    export.write(backbone, tmp_path / "export")
    assert load_file(tmp_path / "export" / openclip.WEIGHTS)["logit_scale"] == 1.5


@pytest.mark.parametrize("kind", FORMATS)
def test_everything_that_open_clip_cannot_express_is_listed(
    backbone: Backbone, kind: str, tmp_path: Path
) -> None:
    backbone.model.pool = nn.Linear(2, 2)
    backbone.model.transformer.resblocks[0].mlp.gelu = nn.GELU()
    backbone.model.ln_final.bias.data[0] = float("nan")
    backbone.model_cfg["text_cfg"]["context_length"] = 77
    with pytest.raises(UserError, match=f"cannot be exported as {kind}") as error:
        export.write(backbone, tmp_path / "export", kind)
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


def test_what_half_precision_cannot_hold_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    backbone.model.ln_final.bias.data[0] = 1e6
    with pytest.raises(UserError, match=r"ln_final\.bias holds NaN or infinity"):
        export.write(backbone, tmp_path / "export", dtype="fp16")
    export.write(backbone, tmp_path / "export", dtype="bf16")


def test_a_format_that_is_none_is_named(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tensorflow' is no format of an export: choose one of open_clip"):
        export.write(backbone, tmp_path / "export", "tensorflow")


def test_a_missing_library_is_named_with_its_extra(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(needs=("no_such_module",)))
    with pytest.raises(UserError, match=r"no_such_module, not installed here: pip install 'longclip\[onnx"):
        export.write(backbone, tmp_path / "export", "onnx")


def test_a_full_disk_leaves_no_half_export(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.write(backbone, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(openclip, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        export.write(backbone, tmp_path)
    assert build(None, f"local-dir:{tmp_path}", 248).model is not None


def test_a_run_that_dies_midway_leaves_nothing_that_opens(tmp_path: Path) -> None:
    def fill(folder: Path, text: str) -> None:
        (folder / "a-config").write_text(text)
        (folder / "weights").write_text(text)

    folders.write_whole(tmp_path, "a-config", lambda folder: fill(folder, "old"))
    (tmp_path / "weights").unlink()
    (tmp_path / "weights").mkdir()  # so that moving the new ones fails
    with pytest.raises(UserError, match="could not be written"):
        folders.write_whole(tmp_path, "a-config", lambda folder: fill(folder, "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_imported_long_clip_keeps_its_features(tmp_path: Path) -> None:
    source = formats.model("tiny-quickgelu", force_context_length=248)
    file = formats.long_clip(source, tmp_path / "longclip.pt")
    directory = export.import_weights(str(file), tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{directory}").eval()
    ids_SL = torch.randint(1, 49407, (2, 248))
    with torch.no_grad():
        assert torch.equal(theirs.encode_text(ids_SL), source.encode_text(ids_SL))
    assert len(json.loads((directory / openclip.CONFIG).read_text())["longclip"]["sha256"]) == 64


def test_imported_openai_archives_are_stretched_on_request(tmp_path: Path) -> None:
    file = formats.openai_archive(formats.model("tiny"), tmp_path / "ViT.pt")
    for context_length, rows in ((None, 77), (248, 248)):
        directory = export.import_weights(str(file), tmp_path / str(rows), context_length=context_length)
        assert load_file(directory / openclip.WEIGHTS)["positional_embedding"].shape[0] == rows


def test_longer_texts_without_training_are_imported_as_asked(tmp_path: Path) -> None:
    source = formats.model("tiny")
    file = formats.openai_archive(source, tmp_path / "ViT.pt")
    directory = export.import_weights(
        str(file), tmp_path / "out", context_length=154, positions="repeat", keep=0, attention_temperature=0.5
    )
    found = load_file(directory / openclip.WEIGHTS)
    table_LD = found["positional_embedding"]
    assert torch.equal(table_LD[:77], table_LD[77:])
    name = "transformer.resblocks.0.attn.in_proj_weight"
    wanted = source.state_dict()[name]
    width = wanted.shape[1]
    torch.testing.assert_close(found[name][:width], 2 * wanted[:width].half().float())
    torch.testing.assert_close(found[name][width:], wanted[width:].half().float())
