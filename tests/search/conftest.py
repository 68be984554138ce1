"""A folder of photos, a tiny model, and a search over them."""

import json

import pytest
import torch
from noise import draw
from safetensors.torch import save_file

from longclip.data.module import transform_of
from longclip.search.folder import walk
from longclip.search.index import Embedder, build
from longclip.search.query import Searcher
from longclip.search.store import Store
from longclip.towers import pretrained
from longclip.towers.clip import DualTower


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for number in range(6):
        draw(root / ("a" if number % 2 else "b/c") / f"{number}.png", number)
    return root


@pytest.fixture(scope="session")
def backbone(tiny):
    torch.manual_seed(0)
    return pretrained.build(tiny, None, None)


@pytest.fixture(scope="session")
def tower(backbone):
    return DualTower(backbone).eval()


@pytest.fixture
def embedder(tower):
    return Embedder(tower, transform_of(tower.preprocess_cfg), batch_size=2)


@pytest.fixture
def search(embedder, tmp_path):
    """A folder -> its searcher."""

    def opened(root):
        index = build(walk(root), embedder, Store(tmp_path / "cache"), lambda done, total: None)
        return Searcher(embedder.tower, embedder.transform, index)

    return opened


@pytest.fixture
def export(backbone, tmp_path):
    """A folder that open_clip and longclip load."""
    folder = tmp_path / "export"
    folder.mkdir()
    config = {"model_cfg": backbone.model_cfg, "preprocess_cfg": backbone.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(backbone.model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
