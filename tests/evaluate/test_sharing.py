"""Judging on many processes finds what one process finds, whatever the number of items each gets."""

from functools import partial

import open_clip
import torch
from folders import BUILDERS
from processes import spawn
from tiny import TINY

from longclip import dist
from longclip.captions import All, First, Whole
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.evaluate import PairSet, Pointing, Retrieval, examine, retrieval
from longclip.evaluate.diagnostics import Concepts, Diagnostics, HiMo, Order, Space
from longclip.evaluate.sharing import collect, collect_values, share
from longclip.tokens import Tokenizer
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import Backbone

PREPROCESS = {
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "size": 24,
    "resize_mode": "shortest",
    "interpolation": "bicubic",
}


def tower():
    torch.manual_seed(0)
    tokenizer = Tokenizer(open_clip.tokenizer.SimpleTokenizer(), 248)
    return DualTower(Backbone(open_clip.CLIP(**TINY), TINY, PREPROCESS, tokenizer))


def judged(scenes, own):
    """Everything that evaluators find, as tensors; 24 scenes in batches of 5, 3 images in batches of 1."""
    retrieval.QUERIES = 7
    model = tower()
    data = DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(64, 8), groups=None,
        tokenizer=model.tokenizer, preprocess=PREPROCESS,
    )  # fmt: skip
    views = {"long": Whole(), "short": First()}
    findings = examine(model, data, {
        "scenes": Retrieval("heldout", views, batch_size=5),
        "pointing": Pointing("heldout", batch_size=7),
        "own": PairSet(own, views={"two": All(2)}, batch_size=1),
        "diagnostics": Diagnostics("heldout", {"order": Order(), "himo": HiMo(), "space": Space()}, 5),
        "concepts": Concepts("heldout", batch_size=5),
    })  # fmt: skip
    found = {}
    for name, one in findings.items():
        found |= {f"{name}/{number}": torch.tensor(value) for number, value in one.numbers.items()}
        found |= {f"{name}/each/{number}": torch.tensor(each.values) for number, each in one.each.items()}
        for view, ranked in one.ranked.items():
            shown = " ".join([*ranked.images, *ranked.texts])
            found[f"{name}/{view}/texts"] = torch.tensor(list(shown.encode()))
            listed = (ranked.owners, ranked.asked, ranked.i2t_first, ranked.t2i_first)
            found |= {f"{name}/{view}/{at}": torch.tensor(values) for at, values in enumerate(listed)}
    return found


def test_two_processes_find_what_one_does(scenes, tmp_path):
    (tmp_path / "own").mkdir()
    BUILDERS["jsonl"](tmp_path / "own")
    alone = judged(scenes, str(tmp_path / "own"))
    for found in spawn(partial(judged, scenes, str(tmp_path / "own")), 2, tmp_path):
        assert found.keys() == alone.keys()
        assert [name for name in alone if not torch.equal(found[name], alone[name])] == []


def shared():
    """Ragged rows of 1, 2 and 5 items; how many turns each process takes."""
    found = {}
    for count in (1, 2, 5):
        mine = list(share(range(count)))
        rows = [torch.full((n, 2), n, dtype=torch.int32) for n in mine]
        found[f"turns/{count}"] = torch.tensor(len(mine))
        found[f"rows/{count}"] = collect(rows, count)
        found[f"flags/{count}"] = collect([row[:, 0] > 1 for row in rows], count)
        found[f"values/{count}"] = torch.tensor(collect_values([[n, 10 * n] for n in mine], count))
    return found | {"world": torch.tensor(dist.world())}


def test_items_come_back_in_order_and_once(tmp_path):
    for found in [shared(), *spawn(shared, 2, tmp_path)]:
        world = int(found["world"])
        for count in (1, 2, 5):
            rows = [n for n in range(count) for _ in range(n)]
            assert found[f"rows/{count}"].tolist() == [[n, n] for n in rows]
            assert found[f"flags/{count}"].tolist() == [n > 1 for n in rows]
            assert found[f"values/{count}"].tolist() == [m for n in range(count) for m in (n, 10 * n)]
            # equally many: a model that is split can only be called by all processes at once
            assert found[f"turns/{count}"] == -(-count // world)
