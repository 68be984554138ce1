"""Hugging Face's CLIP folders come in with transformers' own features, and run nothing."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from longclip import models
from longclip.towers import configs, huggingface
from longclip.towers.positions import stretch
from longclip.towers.pretrained import build
from longclip.types import UserError

TOWER = {
    "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 16,
}  # fmt: skip
LENGTHS = (1, 30, 75)  # words


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request, tmp_path_factory):
    """A random CLIPModel in a folder as transformers saves it, and the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    act = {"hidden_act": request.param}
    config = transformers.CLIPConfig(
        text_config={**TOWER, **act, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**TOWER, **act, "image_size": 24, "patch_size": 12},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fc1" in name or "position_embedding" in name:
                parameter.mul_(30)  # into the range where activations and positions matter
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3,
                 "size": {"height": 24, "width": 24}, "do_center_crop": False}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model, request.param


def ids(length=77):
    """Texts of LENGTHS tokens with start and end token, padded with zeros."""
    ids_SL = torch.zeros(len(LENGTHS), length, dtype=torch.long)
    for row, words in enumerate(LENGTHS):
        ids_SL[row, : words + 2] = torch.tensor([49406, *torch.randint(1, 49000, (words,)), 49407])
    return ids_SL


def test_features_are_those_of_transformers(theirs):
    folder, model, act = theirs
    backbone = models.load(str(folder))
    ids_SL, pixels_BCHW = ids(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = model(input_ids=ids_SL, pixel_values=pixels_BCHW)
        text_SE = backbone.model.encode_text(ids_SL, normalize=True)
        image_BE = backbone.model.encode_image(pixels_BCHW, normalize=True)
    torch.testing.assert_close(text_SE, expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(image_BE, expected.image_embeds, atol=1e-5, rtol=0)
    assert torch.equal(backbone.model.logit_scale, model.logit_scale)
    assert backbone.model_cfg["quick_gelu"] == (act == "quick_gelu")
    assert backbone.tokenizer.context_length == 77


def test_preprocessing_comes_along_and_positions_are_stretched(theirs):
    folder, _, _ = theirs
    backbone = build(None, f"local-dir:{folder}", 248)
    assert backbone.preprocess_cfg == {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic",
        "resize_mode": "squash", "size": 24,
    }  # fmt: skip
    table_LD = load_file(folder / "model.safetensors")["text_model.embeddings.position_embedding.weight"]
    assert torch.equal(backbone.model.positional_embedding, stretch(table_LD, 20, 4))


def test_from_the_hubs_cache_by_name(theirs, tmp_path, monkeypatch):
    folder, model, _ = theirs
    home = tmp_path / "models--org--theirs"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    (home / "snapshots").mkdir()
    (home / "snapshots" / "abc123").symlink_to(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    backbone = build(None, "hf-hub:org/theirs", None)
    assert torch.equal(backbone.model.visual.proj, model.visual_projection.weight.T)
    assert backbone.preprocess_cfg["resize_mode"] == "squash"


def test_a_bare_file_of_theirs_asks_for_its_folder(theirs):
    folder, _, _ = theirs
    with pytest.raises(UserError, match=r"config\.json: name the folder of both"):
        build("ViT-B-32", str(folder / "model.safetensors"), 77)


def test_a_folder_without_a_processor_says_what_it_takes_instead(theirs, tmp_path, caplog):
    folder, _, _ = theirs
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    backbone = build(None, f"local-dir:{tmp_path}", None)
    assert "images are prepared as OpenAI's were" in caplog.text
    assert backbone.preprocess_cfg["resize_mode"] == "shortest"


def test_what_their_configuration_leaves_out_is_openais_base_model():
    found = huggingface.model_cfg({"model_type": "clip"})
    assert not configs.differences(found, configs.named("ViT-B-32-quickgelu"))
    assert found["quick_gelu"] is True
    large = {"hidden_size": 1664, "intermediate_size": 8192, "num_attention_heads": 16, "hidden_act": "gelu"}
    old = {"model_type": "clip", "vision_config": {"hidden_size": 7}, "vision_config_dict": large,
           "text_config": {"hidden_act": "gelu"}}  # fmt: skip
    vision = huggingface.model_cfg(old)["vision_cfg"]
    assert (vision["width"], vision["head_width"]) == (1664, 104)
    assert int(vision["width"] * vision["mlp_ratio"]) == 8192


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip"}, "it is of a 'siglip'"),
        ({"model_type": "clip_text_model"}, "has both towers"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "hidden_act gelu and quick_gelu"),
        ({"model_type": "clip", "text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        ({"model_type": "clip", "text_config": {"vocab_size": 21128}}, "vocab_size 21128"),
        (["clip"], "cannot be used"),
    ],
)
def test_what_open_clip_cannot_be_is_one_sentence(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UserError, match=message) as error:
        build(None, f"local-dir:{tmp_path}", None)
    assert "\n" not in str(error.value)


def test_code_that_a_folder_names_is_never_imported(theirs, tmp_path):
    folder, _, _ = theirs
    evil = json.loads((folder / "config.json").read_text())
    evil["auto_map"] = {"AutoModel": "modeling_evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(evil))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    marker = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    assert build(None, f"local-dir:{tmp_path}", None)
    assert not Path(marker).exists()
