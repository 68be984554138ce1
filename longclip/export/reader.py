"""The other side of a parity check: opens an export with the library that it is meant for, without longclip.

A program for a process of its own: `python -P reader.py job.json`. The job names the format, the folder,
captions, pictures (PNG), the same pictures as pixels that the model's own preprocessing gave, and where
features go: `text` and `ids` of the captions, `image` of the pixels, `picture` of its own preprocessing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

Job = dict[str, Any]


class Hidden:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "longclip":
            raise ImportError("longclip is hidden: an export must open without it")


def open_clip_folder(job: Job) -> dict[str, Any]:
    import open_clip

    name = "local-dir:" + job["directory"]
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    ids = tokenizer(job["texts"])
    own = torch.stack([preprocess(picture) for picture in pictures(job)])
    return {
        "ids": ids,
        "text": model.encode_text(ids),
        "image": model.encode_image(pixels(job)),
        "picture": model.encode_image(own),
    }


def hugging_face(job: Job) -> dict[str, Any]:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(job["directory"], dtype=torch.float32).eval()
    tokens, own = captions_of(job), processed_by(job)
    return {
        "ids": tokens["input_ids"],
        "text": model.get_text_features(**tokens).pooler_output,
        "image": model.get_image_features(pixels(job)).pooler_output,
        "picture": model.get_image_features(own).pooler_output,
    }


def hugging_face_vision(job: Job) -> dict[str, Any]:
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(job["directory"], dtype=torch.float32).eval()
    return {"image": model(pixels(job)).image_embeds, "picture": model(processed_by(job)).image_embeds}


def hugging_face_text(job: Job) -> dict[str, Any]:
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(job["directory"], dtype=torch.float32).eval()
    tokens = captions_of(job)
    return {"ids": tokens["input_ids"], "text": model(**tokens).text_embeds}


def single_file(job: Job) -> dict[str, Any]:
    """Into the tower that loaders of such files build: CLIP-L's, with as many positions as the file has."""
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    state = {
        name: tensor.float() for name, tensor in load_file(job["directory"] + "/clip_l.safetensors").items()
    }
    table = state["text_model.embeddings.position_embedding.weight"]
    width, layers, heads = job["clip_l"]["width"], job["clip_l"]["layers"], job["clip_l"]["heads"]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=len(table),
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.load_state_dict(state)
    return {"text": model(torch.tensor(job["ids"])).text_embeds}


def onnx(job: Job) -> dict[str, Any]:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    def run(graph: str, **inputs: Any) -> Any:
        path = f"{job['directory']}/{graph}.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, inputs)[0])

    encoded = Tokenizer.from_file(job["directory"] + "/tokenizer.json").encode_batch(job["texts"])
    ids = np.array([caption.ids for caption in encoded], np.int64)
    return {
        "ids": torch.from_numpy(ids),
        "text": run("text", input_ids=ids),
        "image": run("image", pixel_values=pixels(job).numpy()),
    }


def captions_of(job: Job) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["directory"])
    return tokenizer(job["texts"], padding="max_length", truncation=True, return_tensors="pt")


def processed_by(job: Job) -> Any:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(job["directory"])
    return processor(pictures(job), return_tensors="pt")["pixel_values"]


def pictures(job: Job) -> Any:
    from PIL import Image

    return [Image.open(path) for path in job["pictures"]]


def pixels(job: Job) -> Any:
    from safetensors.torch import load_file

    return load_file(job["pixels"])["pixels"]


READERS = {
    "open_clip": open_clip_folder,
    "hf": hugging_face,
    "hf-vision": hugging_face_vision,
    "hf-text": hugging_face_text,
    "clip_l": single_file,
    "onnx": onnx,
}

if __name__ == "__main__":
    sys.meta_path.insert(0, Hidden())
    from safetensors.torch import save_file

    job = json.loads(Path(sys.argv[1]).read_text())
    with torch.no_grad():
        found = READERS[job["format"]](job)
    assert "longclip" not in sys.modules
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["out"])
