"""What the names in the pages stand for, made small: photos, shards, a run, an export.

In: an empty folder. Out: `my_photos/`, `datasets/mine`, `runs/mine`, `exports/mine` and others in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from commands import Command, type_in
from PIL import Image

TRAIN, DEV = 16, 8
ARCHITECTURE = "ViT-longclip-tiny"  # conftest's `tiny` registers it

SMALL = (
    f"model.backbone.architecture={ARCHITECTURE}",
    "model.backbone.weights=null",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "samples=8",
    "batch_size=4",
    "optim.warmup=0",
    "data.workers=0",
    "watchdog.minutes=0",
    "export=null",
)
"""Behind a page's own arguments, these make its training one of seconds."""
OWN = ("data=shards", "data.root=datasets/mine", "benchmark=shards", "recipe=long")
"""What "..." stands for."""
SCENES = ("data.prepare.train=16", "data.prepare.heldout=8", "data.prepare.groups=2", "data.prepare.size=24")


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """In this folder, as a user is; files of conf/ that a relative path names are not looked for."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def photos(folder: Path, count: int = TRAIN + DEV) -> Path:
    """Images and a captions.jsonl as docs/start.md describes them."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        y, x = np.mgrid[0:30, 0:36]
        waves = [127 + 100 * np.sin((x * (c + 1) + y + 5 * number) / 6) for c in range(3)]
        Image.fromarray(np.stack(waves, 2).astype(np.uint8)).save(folder / f"{number}.jpg")
        long = f"Picture {number} shows waves of three colours. They are soft. I like number {number}."
        split = "train" if number < TRAIN else "dev"
        lines.append({"image": f"{number}.jpg", "captions": [long], "split": split})
    listing(folder, lines)
    return folder


def listing(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def typed(text: str, *more: str) -> str:
    """Type a command that has to work; what it prints."""
    answer = type_in(Command("", text, ""), *more)
    assert answer.code == 0, answer.printed
    return answer.printed


def make(folder: Path) -> Path:
    """All of it."""
    from longclip.data import scenes

    with inside(folder):
        photos(Path("my_photos"))
        typed("longclip shards my_photos/ --out datasets/mine --workers 1")
        typed("python train.py name=mine", *OWN, *SMALL, "checkpoints.every_steps=1")
        export("runs/mine", "exports/mine")
        scenes.make("datasets/scenes", train=16, heldout=8, groups=2, size=24, processes=1)
        older("models/b16.pt")
    return folder


def older(path: str) -> None:
    """A state dict with 77 positions, as models of others are."""
    import open_clip
    import torch

    Path(path).parent.mkdir()
    model = open_clip.create_model(ARCHITECTURE)
    table_LD = model.positional_embedding.detach()[:77].clone()
    torch.save({**model.state_dict(), "positional_embedding": table_LD}, path)


def beside(whole: Path, folder: Path) -> Path:
    """A fresh folder with the same names in it: its own photos, links to everything else."""
    shutil.copytree(whole / "my_photos", folder / "my_photos")
    for name in ("datasets/mine", "datasets/scenes", "runs/mine", "exports/mine", "models"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(whole / name)
    return folder


def small(command: Command) -> list[str]:
    """What makes a page's training or judging one of seconds."""
    said = {word.partition("=")[0] for word in command.arguments}
    own = OWN if "..." in command.text else ()
    scenes = () if own or {"data", "experiment"} & said else SCENES
    # Runs are judged on what they bring.
    judged = () if "runs/" in command.text and "scenes" not in command.text else scenes
    if command.arguments[:1] == ["shards"]:
        return ["--workers", "1"]
    return list({"train.py": (*own, *SMALL, *scenes), "eval.run": judged}.get(command.program, ()))


def export(source: str, out: str) -> None:
    """As `longclip export`, without the proof in another process, which takes seconds."""
    with unproven():
        typed(f"longclip export {source} --out {out}")


@contextmanager
def unproven() -> Iterator[None]:
    """Exports are not opened by their libraries in a fresh process: tests/export does that."""
    from longclip.export import parity

    with mock.patch.object(parity, "verify", return_value=[parity.Row("", 0.0, 1.0)]):
        yield
