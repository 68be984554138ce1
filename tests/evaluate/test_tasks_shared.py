"""Classes, pairs and masks on two processes: each does a part, both know everything, split model or not."""

import json
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from colours import paint
from PIL import Image
from processes import spawn
from tiny import TINY
from torch.distributed.device_mesh import init_device_mesh

from longclip.evaluate import Choices, Classification, Masks, Questions, Segmentation
from longclip.heat import heat
from longclip.strategies.sharding import prepare
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build


def judged(root, split=False):
    """All that three evaluators find, as one row; `split`: FSDP2 has split the model."""
    open_clip.add_model_config(root / "architectures")
    torch.manual_seed(0)
    tower = DualTower(build("ViT-longclip-tiny", None, 248)).eval()
    if split:
        prepare(tower, [], init_device_mesh("cpu", (2,)))
    questions = Questions({"own": "rows.jsonl"}, "classes/{image}", ["caption"], ["negatives"])
    with torch.no_grad():
        found = [
            Classification(str(root), "folders", "classes", batch_size=2)(tower, None),
            Choices(str(root), questions, batch_size=3)(tower, None),
            Segmentation(str(root), Masks("scenes/{}.png", "masks/{}.png"), ["a", "b"], "simple")(
                tower, None
            ),
        ]
    each = [value for one in found for values in one.each.values() for value in values.values]
    numbers = [number for one in found for number in one.numbers.values()]
    looked = heat(tower, torch.zeros(3, 24, 24, dtype=torch.uint8), ["a red cup", "a hat"])
    return {"row": torch.tensor(each + numbers), "heat": looked.heat_SYX}


@pytest.mark.long
def test_two_processes_find_what_one_finds(tmp_path):
    (tmp_path / "architectures").mkdir()
    (tmp_path / "architectures/ViT-longclip-tiny.json").write_text(json.dumps(TINY))
    paint(tmp_path / "classes/red", a="red", b="blue", c="red-green")
    paint(tmp_path / "classes/green", a="green", b="green-blue")
    rows = [{"image": f"red/{name}.png", "caption": "red", "negatives": ["blue"]} for name in "abca"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise = np.random.default_rng(0)
    for n in range(3):
        for folder, shape, levels in (("scenes", (30, 40, 3), 256), ("masks", (30, 40), 2)):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = noise.integers(0, levels, shape, np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{n}.png")
    alone = judged(tmp_path)
    for split in (False, True):
        (tmp_path / "meet").unlink(missing_ok=True)
        for found in spawn(partial(judged, tmp_path, split), 2, tmp_path):
            assert torch.equal(found["row"], alone["row"])
            assert (found["heat"] - alone["heat"]).abs().max() < 1e-5
