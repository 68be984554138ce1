"""ONNX: any batch size, ids without transformers, what stands beside the graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from tokenizers import Tokenizer
from towers import formats

from longclip import export
from longclip.export import parity
from longclip.towers.pretrained import Backbone, build
from longclip.types import UserError


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return ["a", "a red dog on a bridge", "birds " * 300]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    file = formats.openai_archive(formats.model("tiny-quickgelu"), tmp_path_factory.mktemp("onnx") / "ViT.pt")
    return build("tiny", str(file), 248)


@pytest.fixture(scope="module")
def folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.write(backbone, tmp_path_factory.mktemp("export"), "onnx", provenance={"run": "demo"})


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.long
def test_batches_may_have_any_size(backbone: Backbone, folder: Path, captions: list[str]) -> None:
    ids_SL = open_clip.tokenizer.SimpleTokenizer(context_length=248)(captions)
    pixels_BCHW = torch.rand(5, 3, 32, 32)
    model = backbone.model.eval()
    with torch.no_grad():
        text_SE, image_BE = (
            model.encode_text(ids_SL, normalize=True),
            model.encode_image(pixels_BCHW, normalize=True),
        )
    for size in (1, 3):
        found = run(folder / "text.onnx", input_ids=ids_SL[:size].numpy())
        np.testing.assert_allclose(found, text_SE[:size], atol=1e-4)
    for size in (1, 5):
        found = run(folder / "image.onnx", pixel_values=pixels_BCHW[:size].numpy())
        np.testing.assert_allclose(found, image_BE[:size], atol=1e-4)


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_ids_and_features_are_those_of_the_model(backbone: Backbone, folder: Path) -> None:
    rows = parity.verify(backbone, "onnx", folder)
    assert {row.name.split("/")[0] for row in rows} == {"text", "image"}
    assert max(row.difference for row in rows) <= 1e-4


@pytest.mark.long
def test_ids_need_the_tokenizers_library_alone(folder: Path, captions: list[str]) -> None:
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(captions)
    expected_SL = open_clip.tokenizer.SimpleTokenizer(context_length=248)(captions)
    for caption, expected_L in zip(encoded, expected_SL, strict=True):
        assert len(caption.ids) == 248
        length = int(expected_L.argmax()) + 1
        assert caption.ids[:length] == expected_L[:length].tolist()


@pytest.mark.long
def test_the_folder_says_what_goes_in(folder: Path) -> None:
    config = json.loads((folder / "onnx_config.json").read_text())
    assert (config["context_length"], config["normalised"]) == (248, True)
    assert config["longclip"] == {"run": "demo"}
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 32}


def test_other_precisions_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ONNX graphs are written in fp32"):
        export.write(backbone, tmp_path, "onnx", "fp16")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"resize_mode": "longest"}, "images are resized by 'longest'"),
        ({"interpolation": "nearest"}, "images are resampled by 'nearest'"),
        ({"size": [32, 48]}, r"vision_cfg.image_size is \[32, 48\], not one number"),
    ],
)
def test_preprocessing_without_words_is_refused(
    backbone: Backbone, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    other = backbone._replace(preprocess_cfg=backbone.preprocess_cfg | changed)
    with pytest.raises(UserError, match=words):
        export.write(other, tmp_path, "onnx")
