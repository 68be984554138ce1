"""Weights in, from files of every format: the features stay the source model's, and nothing is silent."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from pathlib import Path

import formats
import huggingface_hub
import open_clip
import pytest
import torch
from torch import Tensor, nn

from longclip.towers import archive, configs
from longclip.towers.positions import stretch
from longclip.towers.pretrained import build
from longclip.types import UserError


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    formats.register(tmp_path_factory.mktemp("configs"))


def features(model: nn.Module, length: int = 77) -> tuple[Tensor, Tensor]:
    """Of texts and images. The texts fit any length: what follows the end token changes nothing."""
    generator = torch.Generator().manual_seed(1)
    ids_SL = torch.zeros(3, length, dtype=torch.long)
    ids_SL[:, :12] = torch.randint(1, 49000, (3, 12), generator=generator)
    ids_SL[:, 12] = 49407
    pixels_BCHW = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        model.eval()
        return model.encode_text(ids_SL), model.encode_image(pixels_BCHW)


def same(model: nn.Module, source: nn.Module, tolerance: float = 1e-5) -> bool:
    ours, theirs = features(model, model.context_length), features(source, source.context_length)
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(ours, theirs, strict=True))


MAKERS = {
    "state dict": (formats.state_dict, "a.pt"),
    "safetensors": (formats.safetensors, "a.bin"),  # told apart by content, not by name
    "trainer": (formats.trainer_checkpoint, "epoch_3.pt"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("architecture", ["tiny", "tiny-custom"])
def test_files_of_open_clip_give_their_features(kind: str, architecture: str, tmp_path: Path) -> None:
    maker, name = MAKERS[kind]
    source = formats.model(architecture)
    backbone = build(architecture, str(maker(source, tmp_path / name)), 77)
    assert same(backbone.model, source, 0)
    assert backbone.model_cfg["quick_gelu"] is False


def test_weights_of_the_older_layout_fit_a_custom_text_model(tmp_path: Path) -> None:
    source = formats.model("tiny")
    backbone = build("tiny-custom", str(formats.state_dict(source, tmp_path / "a.pt")), 77)
    assert same(backbone.model, source, 0)


@pytest.mark.parametrize("architecture", ["tiny", "tiny-quickgelu", None])
def test_openai_archives_bring_quickgelu_and_their_shapes(architecture: str | None, tmp_path: Path) -> None:
    source = formats.model("tiny-quickgelu")
    file = formats.openai_archive(source, tmp_path / "ViT.pt", half=False)
    backbone = build(architecture, str(file), 77)
    assert backbone.model_cfg["quick_gelu"] is True
    assert same(backbone.model, source, 0)
    plain = formats.model("tiny")
    plain.load_state_dict(source.state_dict())
    assert not same(backbone.model, plain, 1e-3), "the activation must be visible in this test"
    with pytest.raises(UserError, match="trained with QuickGELU"):
        build("tiny", str(file), 77, quick_gelu=False)


def test_archives_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    file = formats.openai_archive(formats.model("tiny"), tmp_path / "ViT.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(str(file)).state_dict()
    ours = archive.read_torchscript(file)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code from the file ran",))


@pytest.mark.parametrize("torchscript", [True, False])
def test_files_cannot_run_code(torchscript: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evil.pt"
    if torchscript:
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("a/data.pkl", pickle.dumps(Evil(), protocol=2))
            zipped.writestr("a/constants.pkl", b"")
    else:
        torch.save({"weight": Evil()}, file)
    with pytest.raises(UserError, match=r"asks for|can run code"):
        build("tiny", str(file), 77)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("architecture", ["tiny", None])
def test_long_clip_files_are_merged_at_row_20(architecture: str | None, tmp_path: Path) -> None:
    source = formats.model("tiny-quickgelu", force_context_length=248)
    backbone = build(architecture, str(formats.long_clip(source, tmp_path / "longclip.pt")), 248)
    assert same(backbone.model, source, 0)
    assert backbone.model_cfg["quick_gelu"] is True
    assert backbone.model_cfg["text_cfg"]["context_length"] == backbone.tokenizer.context_length == 248


def test_folders_bring_configuration_and_preprocessing(tmp_path: Path) -> None:
    source = formats.model("tiny-quickgelu")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.1, 0.2, 0.3], "resize_mode": "squash"}
    path = formats.folder(source, formats.CONFIGS["tiny-quickgelu"], tmp_path / "export", preprocess)
    backbone = build(None, f"local-dir:{path}", 77)
    assert same(backbone.model, source, 0)
    assert same(build(f"local-dir:{path}", None, 77).model, source, 0)
    assert backbone.preprocess_cfg == {**preprocess, "interpolation": "bicubic", "size": 32}
    with pytest.raises(UserError, match=r"contradicts .*text_cfg.width 128 and 64"):
        build("tiny-wide", f"local-dir:{path}", 77)


def test_hub_names_are_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = formats.model("tiny")
    cache = formats.hub_cache(source, formats.CONFIGS["tiny"], tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert same(build(None, "hf-hub:org/tiny", 77).model, source, 0)
    with pytest.raises(UserError, match="hf-hub:org/absent could not be downloaded"):
        build(None, "hf-hub:org/absent", 77)


def test_77_positions_are_stretched_and_the_mask_grows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = formats.model("tiny")
    file = str(formats.state_dict(source, tmp_path / "a.pt"))
    with caplog.at_level(logging.INFO, "longclip"):
        backbone = build("tiny", file, 248)
    assert "77 rows became 248 by stretch" in caplog.text
    expected_LD = stretch(source.positional_embedding, 20, 4)
    assert torch.equal(backbone.model.positional_embedding, expected_LD)
    assert backbone.model.attn_mask.shape == (248, 248)
    assert same(backbone.model, source)  # the texts of this test end before row 20
    assert build("tiny", file, None).model_cfg["text_cfg"]["context_length"] == 77
    assert len(build("tiny", file, 250, positions="interpolate").model.positional_embedding) == 250
    with pytest.raises(UserError, match="nearest lengths are 248"):
        build("tiny", file, 250)


def test_frozen_positions_keep_the_features(tmp_path: Path) -> None:
    file = str(formats.state_dict(formats.model("tiny"), tmp_path / "a.pt"))
    backbone = build("tiny", file, 248, freeze_positions=True)
    frozen = [name for name, parameter in backbone.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["parametrizations.positional_embedding.original0"]
    assert same(backbone.model, build("tiny", file, 248).model, 0)


def test_image_positions_are_resized_only_on_request(tmp_path: Path) -> None:
    source = formats.model("tiny")
    file = str(formats.state_dict(source, tmp_path / "a.pt"))
    backbone = build("tiny", file, 77, image_size=64)
    theirs = open_clip.create_model("tiny", pretrained=file, force_image_size=64)
    assert torch.equal(backbone.model.visual.positional_embedding, theirs.visual.positional_embedding)
    assert backbone.preprocess_cfg["size"] == 64
    larger = str(formats.state_dict(backbone.model, tmp_path / "64.pt"))
    with pytest.raises(UserError, match="Only the image size differs: set image_size"):
        build("tiny", larger, 77)


def test_random_weights_follow_the_callers_seed() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build("tiny", None, 130, patch_dropout=0.5).model)
    assert torch.equal(models[0].positional_embedding, models[1].positional_embedding)
    assert models[0].positional_embedding.shape[0] == 130
    assert models[0].visual.patch_dropout.prob == 0.5


@pytest.mark.parametrize("name", ["ViT-scenes", "ViT-photos"])
def test_own_architectures_are_open_clips_too(name: str) -> None:
    backbone = build(name, None, 248)
    assert open_clip.get_model_config(name)["text_cfg"]["context_length"] == 248
    assert backbone.model.positional_embedding.shape[0] == 248


def test_building_is_quiet_and_leaves_logging_alone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = (logging.root.handlers[:], logging.root.manager.disable, open_clip.list_models())
    build("tiny", None, 77)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert before == (logging.root.handlers, logging.root.manager.disable, open_clip.list_models())


def test_a_checkpoint_of_another_architecture_is_one_sentence(tmp_path: Path) -> None:
    file = str(formats.state_dict(formats.model("tiny-wide"), tmp_path / "a.pt"))
    with pytest.raises(UserError) as error:
        build("tiny", file, 77)
    text = str(error.value)
    assert "positional_embedding is [77, 128] there and [77, 64] here" in text
    assert "more" in text
    assert "\n" not in text


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    state = formats.model("tiny").state_dict()
    state["adapter.weight"] = state.pop("ln_final.weight")
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"missing: ln_final.weight; left over: adapter.weight"):
        build("tiny", str(tmp_path / "a.pt"), 77)


def test_lightning_checkpoints_are_explained(tmp_path: Path) -> None:
    file = formats.lightning_checkpoint(formats.model("tiny"), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="longclip export"):
        build("tiny", str(file), 77)


@pytest.mark.parametrize(
    ("architecture", "weights", "message"),
    [
        ("ViT-B16", None, "Near it: .*ViT-B-16"),
        ("ViT-B-16", "opnai", "Its tags: openai, laion400m_e31"),
        ("tiny", "a.pt", "Its tags: none"),
        (None, None, "Name an architecture"),
        (None, "a.pt", "no file 'a.pt'"),
        (None, "local-dir:/nowhere", "no open_clip_config.json in /nowhere"),
        ("local-dir:/a", "b.pt", "brings its own weights"),
        ("coca_ViT-B-32", None, "CoCa"),
    ],
)
def test_mistakes_name_the_way_out(architecture: str | None, weights: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(architecture, weights, 77)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "is no weights file"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"PK\x03\x04 cut", "cut off"),
        (b"\x80\x02}q\x00.", "damaged or cut off"),
        (b"\x09\x00\x00\x00\x00\x00\x00\x00{not json and more", "as safetensors"),
    ],
)
def test_files_that_are_no_weights_say_so(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        build("tiny", str(tmp_path / "a.pt"), 77)


def test_a_state_dict_does_not_say_its_architecture(tmp_path: Path) -> None:
    file = formats.state_dict(formats.model("tiny"), tmp_path / "a.pt")
    with pytest.raises(UserError, match="name it, for example ViT-B-16"):
        build(None, str(file), 77)


def test_tags_bring_activation_and_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = formats.model("tiny")
    file = formats.safetensors(source, tmp_path / "a.safetensors")
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda *_: True)
    given = {"quick_gelu": True, "mean": (0.1, 0.2, 0.3), "file": str(file)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: given)
    backbone = build("tiny", "openai", 77)
    assert backbone.model_cfg["quick_gelu"] is True
    assert backbone.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]
    given["file"] = ""
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match=r"tiny openai could not be downloaded .*: offline"):
        build("tiny", "openai", 77)


def test_real_names_say_the_shapes_of_openais_files() -> None:
    named = configs.named("ViT-B-16-quickgelu")
    with torch.device("meta"):
        theirs = configs.instantiate(named, {})
    found = configs.inferred(theirs.state_dict())
    assert json.dumps(found, sort_keys=True) == json.dumps(named, sort_keys=True)
