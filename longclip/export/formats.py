"""The formats by name: who opens them, what they hold, how they are written, what they cannot express."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import huggingface, onnx_graphs, openclip
from .model import Plain


class Format(NamedTuple):
    """One kind of export."""

    what: str  # in a line, for people
    parts: tuple[str, ...]  # "text", "image"
    marker: str  # the file without which nothing opens the folder
    problems: Callable[[Plain], list[str]]
    write: Callable[[Plain, Path], None]
    needs: tuple[str, ...] = ()  # modules, of the extra of this name in pyproject.toml
    extra: str = ""
    tolerance: float = 1e-5  # largest difference of a normalised feature, in fp32


def _hugging_face(what: str, parts: tuple[str, ...]) -> Format:
    return Format(
        what,
        parts,
        huggingface.CONFIG,
        partial(huggingface.problems, parts=parts),
        partial(huggingface.write, parts=parts),
        needs=("transformers",),
        extra="huggingface",
    )


FORMATS = {
    "open_clip": Format(
        "a folder for open_clip", ("text", "image"), openclip.CONFIG, openclip.problems, openclip.write
    ),
    "hf": _hugging_face("a folder for transformers' CLIPModel", ("text", "image")),
    "hf-vision": _hugging_face("its image tower alone, for LLaVA", ("image",)),
    "hf-text": _hugging_face("its text tower alone, for diffusers", ("text",)),
    "clip_l": Format(
        "the text tower of a ViT-L-14 as one file, for ComfyUI",
        ("text",),
        huggingface.SINGLE,
        huggingface.clip_l_problems,
        huggingface.write_clip_l,
        needs=("transformers",),
        extra="huggingface",
    ),
    "onnx": Format(
        "two graphs for onnxruntime",
        ("text", "image"),
        onnx_graphs.CONFIG,
        onnx_graphs.problems,
        onnx_graphs.write,
        needs=("onnxscript", "onnxruntime", "transformers"),
        extra="onnx,huggingface",
        tolerance=1e-4,
    ),
}
