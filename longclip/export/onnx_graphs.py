"""ONNX: one graph a tower, batches of any size, L2-normalised features out.

    image.onnx   pixels [B, 3, H, W] float32, normalised       -> image_embeds [B, E]
    text.onnx    input_ids [B, L] int64, padded to the context -> text_embeds [B, E]

The names of inputs and outputs are those that transformers.js and Optimum use.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..towers import configs
from ..towers.huggingface import PROCESSOR
from .huggingface import image_processor, processor_problems
from .model import Plain
from .vocabulary import same_tokenizer, write_padded

CONFIG, IMAGE, TEXT = "onnx_config.json", "image.onnx", "text.onnx"
OPSET = 18
LARGEST = 1_900_000_000
"""Bytes of weights that one file takes; protobuf ends at 2 GiB, larger models get a .data file beside."""


class _Image(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(pixel_values), dim=-1)


class _Text(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(input_ids), dim=-1)


def problems(made: Plain) -> list[str]:
    """What the files beside the graphs cannot say, and what onnxruntime does not compute on a processor."""
    found = []
    if made.dtype != torch.float32:
        found.append("ONNX graphs are written in fp32; onnxruntime's own tools convert them")
    if not same_tokenizer(made.tokenizer):
        found.append("the tokenizer is not OpenAI's byte pairs with open_clip's plain cleaning")
    return found + processor_problems(made.preprocess_cfg)


def write(made: Plain, folder: Path) -> None:
    """Both graphs, tokenizer.json (pads and cuts by itself), image processor and configuration."""
    model: Any = configs.instantiate(made.model_cfg, made.preprocess_cfg)
    model.load_state_dict(made.state)
    model.eval()
    side = made.preprocess_cfg["size"]
    height, width = (side, side) if isinstance(side, int) else side
    _trace(_Image(model), torch.rand(2, 3, height, width), "pixel_values", "image_embeds", folder / IMAGE)
    ids_BL = torch.full((2, made.context_length), made.tokenizer.suffix[0])
    _trace(_Text(model), ids_BL, "input_ids", "text_embeds", folder / TEXT)
    write_padded(made.context_length, folder)
    _write_json(folder / PROCESSOR, image_processor(made.preprocess_cfg))
    _write_json(folder / CONFIG, _configuration(made))


def _trace(module: nn.Module, example: Tensor, given: str, found: str, path: Path) -> None:
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    with torch.no_grad(), configs.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own future
        torch.onnx.export(
            module.eval(),
            (example,),
            path,
            input_names=[given],
            output_names=[found],
            opset_version=OPSET,
            dynamic_shapes={given: {0: torch.export.Dim("batch")}},
            external_data=size > LARGEST,
            dynamo=True,
            verbose=False,
        )


def _configuration(made: Plain) -> dict[str, Any]:
    return {
        "context_length": made.context_length,
        "normalised": True,
        "logit_scale": float(made.state["logit_scale"].exp()),
        "model_cfg": made.model_cfg,
        "preprocess_cfg": made.preprocess_cfg,
        "longclip": made.provenance,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
