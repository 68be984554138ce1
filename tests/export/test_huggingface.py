"""Hugging Face's side of an export: tokenizer, image processor, halves, and what its CLIP cannot express."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
)

from longclip import export
from longclip.export import huggingface, vocabulary
from longclip.export.model import Plain, plain
from longclip.towers.merging import merged_state_dict
from longclip.towers.pretrained import Backbone, build
from longclip.types import UserError

SAMPLES = Path(__file__).resolve().parents[1] / "samples" / "captions.jsonl"
ODD = [
    "",
    "!",
    "A  tab\tand\nlines ",
    "It's 3.5°C, isn't it?",
    "She said “no”: it isn’t a ‘dog’",
    "Tom &amp; Jerry&#39;s &quot;car&quot; &amp;lt; 3",
    "naïve CAFÉ Ünïcödé",
    "中文 字符",
    "🙂👍🏽 ok",
    "a-b_c/d",
]


@pytest.fixture
def made(backbone: Backbone) -> Plain:
    return plain(backbone)


def changed(made: Plain, **towers: dict[str, object]) -> Plain:
    config = deepcopy(made.model_cfg)
    for tower, values in towers.items():
        config[tower].update(values)
    return made._replace(model_cfg=config)


def test_ids_are_open_clips_and_cut_at_the_context(tmp_path: Path) -> None:
    captions = [json.loads(line)["caption"] for line in SAMPLES.read_text().splitlines()] + ODD
    vocabulary.write_tokenizer(248, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 248
    ids = theirs(captions, truncation=True)["input_ids"]
    expected_SL = open_clip.tokenizer.SimpleTokenizer(context_length=248)(captions)
    for row, expected_L in zip(ids, expected_SL.tolist(), strict=True):
        assert row == expected_L[: len(row)]
        assert row[-1] == vocabulary.END
    assert max(map(len, ids)) == 248


def test_ids_become_text_again(tmp_path: Path) -> None:
    vocabulary.write_tokenizer(248, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("A café, unbelievably red").input_ids, skip_special_tokens=True) == (
        "a café , unbelievably red"
    )


def test_old_tokenizers_find_the_same_vocabulary(tmp_path: Path) -> None:
    vocabulary.write_tokenizer(248, tmp_path)
    words = json.loads((tmp_path / "vocab.json").read_text())
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert (len(words), len(merges)) == (49408, 48895)
    assert words == AutoTokenizer.from_pretrained(tmp_path).get_vocab()


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pictures_are_resized_as_the_model_saw_them(backbone: Backbone, mode: str) -> None:
    preprocess = {**backbone.preprocess_cfg, "resize_mode": mode}
    processor = CLIPImageProcessor(**huggingface.image_processor(preprocess))
    given = {key: value for key, value in preprocess.items() if key != "size"}
    ours = open_clip.image_transform(image_size=preprocess["size"], is_train=False, **given)
    across, down = np.meshgrid(np.arange(131), np.arange(90))
    picture = Image.fromarray(np.stack([across, down, (across + down) % 128], axis=-1).astype("uint8"))
    theirs_CHW = processor(picture, return_tensors="pt")["pixel_values"][0]
    grey = (theirs_CHW - ours(picture)).abs().amax() * max(preprocess["std"]) * 255
    assert theirs_CHW.shape == (3, 32, 32)
    assert grey < 8  # levels of 255; a picture that is cropped instead of squashed is a hundred away


def test_halves_are_those_of_the_whole(backbone: Backbone, tmp_path: Path) -> None:
    folders = {kind: export.write(backbone, tmp_path / kind, kind) for kind in ("hf", "hf-text", "hf-vision")}
    whole = CLIPModel.from_pretrained(folders["hf"])
    text = CLIPTextModel.from_pretrained(folders["hf-text"])  # what diffusers loads
    vision = CLIPVisionModel.from_pretrained(folders["hf-vision"])  # what LLaVA loads
    ids_BL, pixels_BCHW = torch.randint(0, 49406, (2, 248)), torch.rand(2, 3, 32, 32)
    ids_BL[:, -1] = vocabulary.END
    with torch.no_grad():
        assert torch.equal(text(ids_BL).last_hidden_state, whole.text_model(ids_BL).last_hidden_state)
        assert torch.equal(
            vision(pixels_BCHW).last_hidden_state, whole.vision_model(pixels_BCHW).last_hidden_state
        )


@pytest.mark.parametrize(("kind", "cls"), [("hf", CLIPModel), ("hf-text", CLIPTextModelWithProjection)])
def test_no_tensor_is_missing_or_left_over(backbone: Backbone, kind: str, cls: type, tmp_path: Path) -> None:
    directory = export.write(backbone, tmp_path / "export", kind, provenance={"run": "demo"})
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.longclip == {"run": "demo"}


def test_an_export_comes_back_as_the_model_it_was(backbone: Backbone, tmp_path: Path) -> None:
    directory = export.write(backbone, tmp_path / "export", "hf")
    again = build(None, f"local-dir:{directory}", 248)
    expected = merged_state_dict(backbone.model)
    assert again.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    assert again.preprocess_cfg == backbone.preprocess_cfg


def test_padding_does_not_move_a_caption(backbone: Backbone, tmp_path: Path) -> None:
    directory = export.write(backbone, tmp_path / "export", "hf-text")
    model, tokenizer = (
        CLIPTextModelWithProjection.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    short = ["a red dog"]
    with torch.no_grad():
        alone = model(**tokenizer(short, return_tensors="pt")).text_embeds
        padded = model(**tokenizer(short, padding="max_length", return_tensors="pt")).text_embeds
        # as diffusers calls it: no attention mask
        bare = model(tokenizer(short, padding="max_length", return_tensors="pt").input_ids).text_embeds
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare, alone, atol=1e-5, rtol=1e-5)


def test_a_diffusion_pipeline_reads_prompts_to_their_end(backbone: Backbone, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    directory = export.write(backbone, tmp_path / "export", "hf-text")
    absent = ("vae", "unet", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
    index = {"_class_name": "StableDiffusionPipeline", **{name: [None, None] for name in absent}}
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path,
        tokenizer=AutoTokenizer.from_pretrained(directory),
        text_encoder=CLIPTextModel.from_pretrained(directory),
        **dict.fromkeys(absent),
    )
    prompts = [" ".join(["a red dog on a bridge"] * 30 + [last]) for last in ("at night", "at noon")]
    with torch.no_grad():
        night, noon = (pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts)
    assert night.shape[1] == 248
    assert torch.equal(night[:, :181], noon[:, :181])  # the start token and 180 words
    assert not torch.equal(night[:, 181:], noon[:, 181:])


@pytest.mark.parametrize(
    ("tower", "values", "words"),
    [
        (
            "vision_cfg",
            {"pool_type": "avg"},
            "vision_cfg.pool_type is 'avg'; Hugging Face's CLIP is made as with 'tok'",
        ),
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value is 0.1"),
        ("vision_cfg", {"timm_model_name": "vit_tiny"}, "vision_cfg.timm_model_name is 'vit_tiny'"),
        ("vision_cfg", {"layers": [2, 2, 2, 2]}, "vision_cfg.layers is [2, 2, 2, 2], not one number"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask is True"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name is 'roberta-base'"),
    ],
)
def test_what_its_clip_cannot_express_is_named(
    made: Plain, tower: str, values: dict[str, object], words: str
) -> None:
    problems = huggingface.problems(changed(made, **{tower: values}))
    assert len(problems) == 1
    assert words in problems[0]


def test_a_half_is_only_asked_about_itself(made: Plain) -> None:
    averaged = changed(made, vision_cfg={"pool_type": "avg"})
    assert huggingface.problems(averaged, ("text",)) == []
    assert len(huggingface.problems(averaged, ("image",))) == 1


def test_every_setting_of_open_clip_is_known_or_refused(made: Plain) -> None:
    """A setting that a later open_clip adds is refused until somebody has looked at it."""
    strange = changed(made, vision_cfg={"new_setting": 1})
    assert "vision_cfg.new_setting is 1" in huggingface.problems(strange)[0]


def test_a_trained_bias_has_no_place(made: Plain) -> None:
    biased = made._replace(state={**made.state, "logit_bias": torch.tensor(-10.0)})
    assert "logit_bias" in huggingface.problems(biased)[0]
    assert huggingface.problems(biased, ("text",)) == []


def test_clip_l_is_only_the_tower_of_vit_l_14(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        export.write(backbone, tmp_path, "clip_l")
    assert "width is 64, clip_l's is 768" in str(error.value)
    assert "embed_dim is 16, clip_l's is 768" in str(error.value)
    assert "quick_gelu" not in str(error.value)
