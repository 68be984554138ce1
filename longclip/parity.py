"""Is an export what it claims to be? Opened by open_clip in a process without longclip, it must give the
features of the model it came from.

    parity.verify(backbone, "runs/demo/export")   # {"text/1": 1.2e-07, ..., "image/1": 8.9e-08}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from .tokens import pack, unpack
from .towers.pretrained import Backbone
from .types import Text, UserError

TOLERANCE = 1e-5
"""Largest difference of a normalised feature that `verify` accepts."""

CAPTION_TOKENS = (1, 76, 77, 248, 400)
"""Lengths that `verify` tries: a word, both sides of CLIP's 77, and both sides of 248."""


def verify(
    backbone: Backbone,
    directory: str | Path,
    encode_text: Callable[[list[str]], Tensor] | None = None,
    encode_image: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Open an export in a fresh process where longclip cannot be imported, and compare features.

    Texts are captions of `CAPTION_TOKENS` words, images two generated pictures of different shape that
    each side preprocesses itself. `encode_text` maps captions to [S, E] and `encode_image` normalised
    pixels [B, C, H, W] to [B, E]; without them the model's own padded forward is used. Features are
    L2-normalised before they are compared. The model is put in eval mode meanwhile.

    Returns the largest absolute differences: "text/1", "text/76", ..., "image/0", "image/1".
    Raises UserError if one is above `TOLERANCE` or open_clip cannot open the folder.
    """
    texts = [_caption(count) for count in CAPTION_TOKENS]
    pictures = [_picture(240, 160), _picture(90, 130)]
    theirs = _open_elsewhere(Path(directory).expanduser().resolve(), texts, pictures)
    model: Any = backbone.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            text_SE = encode_text(texts) if encode_text else _encode_text(backbone, texts)
            pixels_BCHW = _preprocessed(backbone, pictures)
            image_BE = (encode_image or model.encode_image)(pixels_BCHW)
    finally:
        model.train(training)
    names = [f"text/{count}" for count in CAPTION_TOKENS] + [f"image/{i}" for i in range(len(pictures))]
    both = zip([*text_SE, *image_BE], [*theirs["text"], *theirs["image"]], strict=True)
    found = {name: _difference(ours, other) for name, (ours, other) in zip(names, both, strict=True)}
    # Written so that NaN, which compares as false, counts as a difference.
    apart = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if apart:
        raise UserError(
            f"{directory} opens in open_clip, but gives other features than the model it came from: "
            f"{', '.join(f'{name} by {value:.1e}' for name, value in apart.items())} "
            f"(at most {TOLERANCE:.0e} is accepted)."
        )
    return found


def _caption(count: int) -> str:
    """`count` words that are one token each for open_clip's tokenizer, in no repeating order."""
    words = ("a", "red", "dog", "on", "the", "old", "bridge", "near", "blue", "water", "with", "birds")
    return " ".join(words[(i * i + i // 5) % len(words)] for i in range(count))


def _picture(width: int, height: int) -> Image.Image:
    """Coloured gradients: every resampling, crop and normalisation shows in them."""
    x_W, y_H = torch.arange(width), torch.arange(height)[:, None]
    channels = [(x_W * 3 + y_H) % 256, (x_W + y_H * 5) % 256, (x_W * y_H // 7) % 256]
    return Image.fromarray(torch.stack(channels, dim=-1).to(torch.uint8).numpy())


def _encode_text(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    tokenizer = backbone.tokenizer
    model: Any = backbone.model
    packed = pack([[Text(tokenizer.ids(tokenizer.clean(text)))] for text in texts], tokenizer)
    lengths_S = packed.lengths_BK.flatten()
    ids_SL = unpack(packed.tokens_T, lengths_S, tokenizer.context_length, tokenizer.pad_id)
    return model.encode_text(ids_SL.to(model.logit_scale.device))


def _preprocessed(backbone: Backbone, pictures: Sequence[Image.Image]) -> Tensor:
    given = dict(backbone.preprocess_cfg)
    transform = open_clip.image_transform(image_size=given.pop("size"), is_train=False, **given)
    device = next(backbone.model.parameters()).device
    return torch.stack([transform(picture) for picture in pictures]).to(device)


def _difference(ours_E: Tensor, theirs_E: Tensor) -> float:
    ours_E, theirs_E = (nn.functional.normalize(t.float().cpu(), dim=-1) for t in (ours_E, theirs_E))
    return float((ours_E - theirs_E).abs().max())


_READER = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "longclip":
            raise ImportError("longclip is hidden: an export must open without it")

sys.meta_path.insert(0, Hidden())
import open_clip, torch
from PIL import Image
from safetensors.torch import save_file

job = json.load(open(sys.argv[1]))
name = "local-dir:" + job["directory"]
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
model.eval()
with torch.no_grad():
    text = model.encode_text(tokenizer(job["texts"]))
    image = model.encode_image(torch.stack([preprocess(Image.open(path)) for path in job["pictures"]]))
assert "longclip" not in sys.modules
save_file({"text": text.contiguous(), "image": image.contiguous()}, job["out"])
"""


def _open_elsewhere(
    directory: Path, texts: Sequence[str], pictures: Sequence[Image.Image]
) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        out, paths = Path(folder) / "features.safetensors", []
        for i, picture in enumerate(pictures):
            paths.append(f"{folder}/{i}.png")
            picture.save(paths[-1])
        job = {"directory": str(directory), "texts": list(texts), "pictures": paths, "out": str(out)}
        (Path(folder) / "job.json").write_text(json.dumps(job))
        # Offline: a folder that needs the network is no export. Without CUDA: both sides in plain float32.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", "-c", _READER, f"{folder}/job.json"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"open_clip alone cannot open the export {directory}: {reason}")
        return load_file(out)
