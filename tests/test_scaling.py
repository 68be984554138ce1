"""The formulas of docs/scaling.md count what two processes send, and its tables are what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from processes import Results, spawn
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import documents, work
from benchmarks.lengths import LONG
from benchmarks.measures import flops
from benchmarks.scaling import tables
from benchmarks.traffic import (
    Assumptions,
    contrast_flops,
    gathered,
    ring,
    stationary,
    zero_held,
    zero_sent,
)
from longclip.objectives import Contrastive
from longclip.towers.clip import DualTower
from longclip.towers.pooled import pool_alone
from longclip.towers.pretrained import build
from longclip.types import Batch, Embeddings

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
IMAGES, SUBS = 3, 2
SLOTS = {"long": slice(0, 1), "sub": slice(1, 1 + SUBS)}


class Step(nn.Module):
    """A recipe with several captions an image; a term may have parameters of its own, as the towers do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = DualTower(build("ViT-scenes", None, LONG))
        self.terms = nn.ModuleDict({name: Contrastive(name) for name in SLOTS})

    def forward(self, batch: Batch) -> Tensor:
        embeddings = self.tower(batch, SLOTS)
        return torch.stack([term(embeddings).value for term in self.terms.values()]).sum()


def batch() -> Batch:
    lengths_BK = torch.tensor([[9, 5, 4], [12, 3, 0], [7, 6, 5]], dtype=torch.int32)
    return Batch(
        keys=[str(i) for i in range(IMAGES)],
        pixels_BCHW=torch.randint(256, (IMAGES, 3, 72, 72), dtype=torch.uint8),
        tokens_T=torch.randint(1000, (int(lengths_BK.sum()),), dtype=torch.int32),
        lengths_BK=lengths_BK,
        dropped_BK=torch.zeros_like(lengths_BK),
        longest=12,
    )


def sends() -> Results:
    """Bytes that this process sends in a step by the ring algorithm, for every collective called."""
    world, sent = distributed.get_world_size(), {"features": 0, "gradients": 0, "other": 0}

    def watch(name, kind, count):
        function = getattr(distributed, name)

        def counted(*args, **kwargs):
            sent[kind] += count(*args)
            return function(*args, **kwargs)

        setattr(distributed, name, counted)

    def reduce(state, bucket):
        sent["gradients"] += 2 * (world - 1) * bucket.buffer().nbytes // world
        work = reduction(bucket.buffer().div_(world), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    torch.manual_seed(0)
    model = DistributedDataParallel(Step())
    reduction = distributed.all_reduce
    model.register_comm_hook(None, reduce)
    watch("all_gather_into_tensor", "features", lambda out, own: (world - 1) * own.nbytes)
    watch("reduce_scatter_tensor", "features", lambda own, whole: (world - 1) * whole.nbytes // world)
    watch("all_to_all_single", "features", lambda received, own: own.nbytes - own[0].nbytes)
    for name in ("all_reduce", "broadcast", "all_gather", "reduce", "send", "isend"):
        watch(name, "other", lambda *args: 1)
    model(batch()).backward()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {name: torch.tensor(value) for name, value in {**sent, "trainable": trainable}.items()}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return spawn(sends, 2, tmp_path_factory.mktemp("gloo"))


def test_two_processes_send_the_features_that_the_formula_says(counted):
    said = Assumptions(model="ViT-scenes", batch=IMAGES, captions=1 + SUBS)
    assert [int(found["features"]) for found in counted] == [stationary(said, world=2)] * 2
    assert [int(found["other"]) for found in counted] == [0, 0]


def test_two_processes_send_the_gradients_that_the_formula_says(counted):
    said = Assumptions(model="ViT-scenes")
    assert int(counted[0]["trainable"]) == said.parameters
    assert [int(found["gradients"]) for found in counted] == [zero_sent(said, 2, 0)] * 2


def test_one_process_sends_nothing():
    said = Assumptions()
    assert gathered(said, 1) == ring(said, 1) == stationary(said, 1) == 0
    assert [zero_sent(said, 1, stage) for stage in range(4)] == [0] * 4


def test_zero_stages_divide_one_state_after_the_other():
    said = Assumptions(param_bytes=2, grad_bytes=2, optim_bytes=12)
    per_parameter = [zero_held(said, 64, stage) / said.parameters for stage in range(4)]
    # 16, 4 + 12/N, 2 + 14/N and 16/N bytes: figure 1 of the paper
    assert per_parameter == pytest.approx([16, 4 + 12 / 64, 2 + 14 / 64, 16 / 64])


def test_counted_flops_are_those_of_the_towers():
    backbone = build("ViT-scenes", None, LONG)
    pixels, captions = torch.zeros(2, 3, 72, 72), torch.zeros(3, LONG, dtype=torch.long)
    config = work.config("ViT-scenes")
    assert flops(lambda: backbone.model.encode_image(pixels)) == 2 * work.image_forward(config)
    padded = flops(lambda: backbone.model.encode_text(captions))
    ours = work.text_forward(config, np.full((3, 1), LONG))
    text = config["text_cfg"]
    pairs, width = LONG * (LONG - 1) // 2, text["width"]
    # torch counts a causal attention as a full one, and open_clip's last block works for all tokens
    spared = text["layers"] * 4 * width * pairs + 20 * width**2 * (LONG - 1)
    spared += 4 * width * (LONG * (LONG + 1) // 2 - LONG)
    assert padded == ours + 3 * spared


def test_counted_flops_of_an_image_tower_are_those_that_its_class_token_needs():
    config = work.config("ViT-scenes")
    config["vision_cfg"].pop("pool_type")
    visual = CLIP(**config).visual
    pool_alone(visual)
    assert flops(lambda: visual(torch.zeros(2, 3, 72, 72))) == 2 * work.image_forward(config)


def test_counted_flops_are_those_of_the_loss():
    said = Assumptions(model="ViT-scenes", batch=6, captions=SUBS)
    image_BE, text_BKE = (
        torch.randn(6, 128, requires_grad=True),
        torch.randn(6, SUBS, 128, requires_grad=True),
    )
    embeddings = Embeddings(
        image_BE=image_BE,
        text_BKE=text_BKE,
        mask_BK=torch.ones(6, SUBS, dtype=torch.bool),
        slots={"sub": slice(0, SUBS)},
        scale=torch.tensor(7.0),
        gather=lambda x: x,
    )
    assert flops(lambda: Contrastive("sub")(embeddings).value.backward()) == contrast_flops(said, 1)


@pytest.mark.parametrize(("model", "batch"), [("ViT-B-16", 512), ("ViT-L-14", 256)])
def test_the_document_holds_what_the_script_prints(model, batch):
    assert documents.read(DOCUMENT, model) == tables(Assumptions(model=model, batch=batch))
