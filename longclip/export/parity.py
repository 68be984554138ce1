"""Is an export what it claims to be? Opened by the library that it is meant for, in a process without
longclip, it must make the same ids of the same captions and the features of the model it came from.

    for row in parity.verify(backbone, "hf", "exports/mine"): print(row)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..tokens import Tokenizer, pack
from ..towers.clip import DualTower
from ..towers.pretrained import Backbone
from ..types import Text, UserError
from . import huggingface
from .formats import FORMATS

CAPTION_TOKENS = (1, 76, 77, 248, 400)
"""Lengths that `verify` tries: a word, both sides of CLIP's 77, and both sides of 248."""

HALF = {"bf16": 5e-2, "fp16": 5e-3}
"""What is accepted of weights in half precision, whose own rounding moves the features."""

OWN_RESIZING = 5e-2
"""What is accepted where a library resizes a picture in its own way, a grey level off here and there."""


class Row(NamedTuple):
    """One feature on both sides."""

    name: str  # "text/248", "image/0", "picture/0"
    difference: float  # the largest of its L2-normalised numbers
    accepted: float

    @property
    def equal(self) -> bool:
        """Written so that NaN, which compares as false, counts as a difference."""
        return self.difference <= self.accepted


class Shown(NamedTuple):
    """What both sides are given, and what this side makes of it."""

    captions: list[str]
    ids: list[list[int]]  # start and end token included, cut at the context
    pictures: list[Image.Image]
    pixels_BCHW: Tensor  # the pictures as the model's own preprocessing gives them
    text_SE: Tensor
    image_BE: Tensor


def verify(backbone: Backbone, kind: str, directory: str | Path, dtype: str = "fp32") -> list[Row]:
    """Open an export in a fresh process where longclip cannot be imported, and compare.

    Captions have `CAPTION_TOKENS` tokens and run packed here, as in training; the pictures are two generated
    ones of different shape. Returns a row for each of text/N (captions), image/N (the same pixels on both
    sides) and picture/N (each side's own preprocessing). The model is in eval mode meanwhile.

    Raises UserError where ids differ, a row is above what is accepted, or the library cannot open the folder.
    """
    directory = Path(directory).expanduser().resolve()
    shown = _shown(backbone)
    theirs = _open_elsewhere(kind, directory, shown)
    if "ids" in theirs:
        _check_ids(kind, shown, theirs.pop("ids"))
    accepted = HALF.get(dtype, FORMATS[kind].tolerance)
    rows = _rows(shown, theirs, accepted, accepted if kind == "open_clip" else max(accepted, OWN_RESIZING))
    apart = [
        f"{row.name} by {row.difference:.1e} (accepted {row.accepted:.0e})" for row in rows if not row.equal
    ]
    if apart:
        raise UserError(
            f"{directory} opens as {kind}, but gives other features than the model it came from: "
            f"{', '.join(apart)}."
        )
    return rows


def show(rows: Sequence[Row], kind: str) -> None:
    """Print them as a table."""
    table = Table("feature", "largest difference", "accepted", title=f"{kind}, opened without longclip")
    for row in rows:
        table.add_row(row.name, f"{row.difference:.1e}", f"{row.accepted:.0e}")
    Console(width=None if Console().is_terminal else 110).print(table)


def _shown(backbone: Backbone) -> Shown:
    captions = [_caption(backbone.tokenizer, count) for count in CAPTION_TOKENS]
    pictures = [_picture(240, 160), _picture(90, 130)]
    pixels_BCHW = _preprocessed(backbone, pictures)
    tower, model = DualTower(backbone), backbone.model
    training = model.training
    tower.eval()
    try:
        with torch.no_grad():
            text_SE, image_BE = tower.encode_captions(captions), tower.backbone.encode_image(pixels_BCHW)
    finally:
        model.train(training)
    return Shown(captions, _ids(backbone.tokenizer, captions), pictures, pixels_BCHW, text_SE, image_BE)


def _rows(shown: Shown, theirs: dict[str, Tensor], accepted: float, resized: float) -> list[Row]:
    here = {
        "text": (CAPTION_TOKENS, shown.text_SE, accepted),
        "image": (range(len(shown.pictures)), shown.image_BE, accepted),
        "picture": (range(len(shown.pictures)), shown.image_BE, resized),
    }
    return [
        Row(f"{what}/{label}", _difference(ours_E, theirs_E), limit)
        for what, (labels, ours_NE, limit) in here.items()
        if what in theirs
        for label, ours_E, theirs_E in zip(labels, ours_NE, theirs[what], strict=True)
    ]


def _difference(ours_E: Tensor, theirs_E: Tensor) -> float:
    ours_E, theirs_E = (nn.functional.normalize(t.float().cpu(), dim=-1) for t in (ours_E, theirs_E))
    return float((ours_E - theirs_E).abs().max())


def _check_ids(kind: str, shown: Shown, theirs_SL: Tensor) -> None:
    for count, ours, row_L in zip(CAPTION_TOKENS, shown.ids, theirs_SL.tolist(), strict=True):
        if row_L[: len(ours)] != ours:
            raise UserError(
                f"the tokenizer of this {kind} export gives other ids than the model was trained on, first "
                f"for a caption of {count} tokens: {ours[:8]} ... here, {row_L[:8]} ... there"
            )


def _caption(tokenizer: Tokenizer, count: int) -> str:
    """Words of `count` tokens in all, in no repeating order: cases, digits, accents, signs, then filler."""
    words = "A red dog, the old BRIDGE near blue-green water; café No. 1995 isn't far: 中 “birds” sing"
    chosen: list[str] = []
    left, i = count, 0
    while left > 0:
        word = words.split()[(i * i + i // 5) % 17]
        size = len(tokenizer.ids(tokenizer.clean(word)))
        word, size = (word, size) if size <= left else ("a", 1)
        chosen.append(word)
        left, i = left - size, i + 1
    return " ".join(chosen)


def _picture(width: int, height: int) -> Image.Image:
    """Coloured gradients: every resampling, crop and normalisation shows in them."""
    x_W, y_H = torch.arange(width), torch.arange(height)[:, None]
    channels = [(x_W * 3 + y_H) % 256, (x_W + y_H * 5) % 256, (x_W * y_H // 7) % 256]
    return Image.fromarray(torch.stack(channels, dim=-1).to(torch.uint8).numpy())


def _ids(tokenizer: Tokenizer, captions: Sequence[str]) -> list[list[int]]:
    packed = pack([[Text(tokenizer.ids(tokenizer.clean(caption)))] for caption in captions], tokenizer)
    return [ids_T.tolist() for ids_T in packed.tokens_T.split(packed.lengths_BK.flatten().tolist())]


def _preprocessed(backbone: Backbone, pictures: Sequence[Image.Image]) -> Tensor:
    given = dict(backbone.preprocess_cfg)
    transform = open_clip.image_transform(image_size=given.pop("size"), is_train=False, **given)
    device = next(backbone.model.parameters()).device
    return torch.stack([transform(picture) for picture in pictures]).to(device)


def _open_elsewhere(kind: str, directory: Path, shown: Shown) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        job = _job(kind, directory, shown, Path(folder))
        (Path(folder) / "job.json").write_text(json.dumps(job))
        # Offline: a folder that needs the network is no export. Without CUDA: both sides in plain float32.
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **quiet}
        command = [sys.executable, "-P", str(Path(__file__).parent / "reader.py"), f"{folder}/job.json"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"without longclip, the {kind} export {directory} cannot be opened: {reason}")
        return load_file(job["out"])


def _job(kind: str, directory: Path, shown: Shown, folder: Path) -> dict[str, Any]:
    paths = [f"{folder}/{i}.png" for i in range(len(shown.pictures))]
    for path, picture in zip(paths, shown.pictures, strict=True):
        picture.save(path)
    save_file({"pixels": shown.pixels_BCHW.cpu().contiguous()}, folder / "pixels.safetensors")
    longest = max(map(len, shown.ids))
    return {
        "format": kind,
        "directory": str(directory),
        "texts": shown.captions,
        "ids": [[*ids, *[huggingface.PAD] * (longest - len(ids))] for ids in shown.ids],
        "clip_l": huggingface.CLIP_L,
        "pictures": paths,
        "pixels": f"{folder}/pixels.safetensors",
        "out": f"{folder}/features.safetensors",
    }
