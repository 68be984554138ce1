"""A model as training leaves it, and the reader of exports in this process instead of a fresh one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from towers import formats

from longclip.export import parity, reader
from longclip.towers.pretrained import Backbone, build


@pytest.fixture(scope="session", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    formats.register(tmp_path_factory.mktemp("configs"))


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    """Stretched to 248 tokens, frozen head, QuickGELU, patch dropout."""
    file = formats.openai_archive(formats.model("tiny-quickgelu"), tmp_path / "ViT.pt")
    return build("tiny", str(file), 248, freeze_positions=True, patch_dropout=0.25)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reader without a process of its own, which costs seconds."""

    def read(kind: str, directory: Path, shown: parity.Shown) -> dict[str, Tensor]:
        (tmp_path / "job").mkdir(exist_ok=True)
        with torch.no_grad():
            return reader.READERS[kind](parity._job(kind, directory, shown, tmp_path / "job"))

    monkeypatch.setattr(parity, "_open_elsewhere", read)
