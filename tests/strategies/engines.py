"""Trains tiny recipes under one engine, in every process of a group that `processes.spawn` has started.

Lightning's DeepSpeed strategy demands CUDA. `ZeroOnProcessors` replaces that guard and the device, and
nothing else: all the rest of both libraries runs as it would on GPUs.
"""

import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning
import open_clip
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from processes import spawn
from tiny import TINY
from torch import distributed

from longclip import dist, strategies
from longclip.captions import First, Groups, Sentences, Whole
from longclip.checkpoints import Checkpoints
from longclip.curriculum import Curriculum
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.objectives import Contrastive, Grouping
from longclip.objectives.components import PrimaryComponents
from longclip.objectives.sigmoid import Sigmoid
from longclip.optim import AdamW
from longclip.strategies.states import averaged, state_of
from longclip.strategies.zero import Zero
from longclip.towers.clip import DualTower
from longclip.towers.positions import freeze_head, text_module
from longclip.towers.pretrained import build
from longclip.training import LongClip

BATCH, PLANNED = 16, 20 * 16
NAME = "ViT-longclip-engines"


class Job(NamedTuple):
    """One training; folders are strings because they travel to other processes."""

    recipe: str
    steps: int
    run: str
    scenes: str
    resume: str | None = None
    precision: str = "32-true"
    micro_batch: int | None = None
    save_every: int = 0
    lr: float = 1e-3


class ZeroOnProcessors(Zero):
    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self):
        return torch.device("cpu", 0)  # DeepSpeed needs an index

    def setup_distributed(self):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for a minute
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def strategy(engine):
    """ "one", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"."""
    if engine.startswith("zero"):
        options = {"timeout_minutes": 1, "process_group_backend": "gloo"}
        return ZeroOnProcessors(int(engine[4]), "offload" in engine, **options)
    return {"one": lambda _: "auto", "ddp": strategies.ddp, "fsdp2": strategies.fsdp2}[engine](1)


RECIPES = {
    "dreamlip": (
        {"raw": Whole(), "sub": Sentences(2)},
        lambda: {"raw": Contrastive("raw"), "sub": Contrastive("sub"), "grouping": Grouping("sub")},
    ),
    "longclip": (
        {"long": Whole(), "short": First()},
        lambda: {"long": Contrastive("long"), "short": PrimaryComponents("short", k=4)},
    ),
    "siglip": ({"long": Whole()}, lambda: {"long": Sigmoid("long")}),
}


CURRICULA = {
    "siglip": Curriculum(PLANNED, image_size=[(0, 12), (0.1, None)], context_length=[(0, 40), (0.2, None)])
}


def parts(job):
    """A module and its data; longclip's first 20 position rows are frozen."""
    torch.manual_seed(0)
    groups, terms = RECIPES[job.recipe]
    tower = DualTower(build(NAME, None, 248))
    if job.recipe == "longclip":
        freeze_head(text_module(tower.backbone), 20)
    groups = Groups(groups, seed=0)
    optim = AdamW(lr=job.lr, warmup=32, samples=PLANNED, ema=32)
    module = LongClip(tower, terms(), groups.slots, optim, seed=0, micro_batch=job.micro_batch)
    data = DataModule(
        root=job.scenes, train="train", judge=["heldout"], plan=Plan(PLANNED, BATCH), groups=groups,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg, workers=0,
        curriculum=CURRICULA.get(job.recipe),
    )  # fmt: skip
    return module, data


class Averaged(lightning.Callback):
    """As a judgement between steps does: the weights become their averages, and again what they were."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step != 4:
            return
        before = whole(trainer)
        averages = {name.removeprefix("ema/") for name in before if name.startswith("ema/")}
        with averaged(trainer):
            inside = whole(trainer)
        assert averages
        assert all(torch.equal(inside[f"weights/{name}"], before[f"ema/{name}"]) for name in averages)
        assert any(not torch.equal(inside[name], before[name]) for name in inside)
        after = whole(trainer)
        assert all(torch.equal(after[name], before[name]) for name in before)


class Watch(lightning.Callback):
    """Keeps the global loss of every step and the whole state as it was right after the start."""

    def __init__(self, stop_after):
        self.losses, self.stop_after, self.begun = [], stop_after, {}

    def on_train_start(self, trainer, module):
        self.begun = whole(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().double().reshape(1)
        self.losses.append(dist.gather(loss).mean().item())
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True


def whole(trainer):
    state = state_of(trainer)
    return {name: state.get(name).detach().clone() for name in state.shapes()}


def fit(engine, job, callbacks=()):
    """Train; returns losses, and the whole state at the start ("begun/...") and at the end ("ended/...")."""
    warnings.filterwarnings("ignore", module="lightning")
    folder = Path(job.run) / f"architecture-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    module, data = parts(job)
    watch = Watch(job.steps)
    saves = Checkpoints(job.run, job.save_every, 0, 9, Path(job.resume) if job.resume else None)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=dist.world(), strategy=strategy(engine), max_steps=PLANNED // BATCH,
        max_epochs=-1, logger=False, precision=job.precision, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        gradient_clip_val=1.0, log_every_n_steps=2, default_root_dir=job.run,
        callbacks=[saves, Averaged(), watch, *callbacks],
    )  # fmt: skip
    trainer.fit(module, data)
    results = {"losses": torch.tensor(watch.losses, dtype=torch.float64)}
    results |= {f"begun/{name}": value for name, value in watch.begun.items()}
    return results | {f"ended/{name}": value for name, value in whole(trainer).items()}


def fit_on(engine, world, folder, jobs):
    """The results of each job on the first of `world` processes, after asserting that all ended alike."""
    found = spawn(partial(_child, engine, jobs), world, folder)
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(found[0][name], other[name]) for name in other)
    split = {name.partition(":")[0] for name in found[0]}
    return {
        job: {n.partition(":")[2]: v for n, v in found[0].items() if n.partition(":")[0] == job}
        for job in split
    }


def in_group():
    """Tell Lightning of the group that `processes` has started."""
    rank, world = str(distributed.get_rank()), str(distributed.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="test")


def _child(engine, jobs):
    in_group()
    results = {}
    for name, job in jobs.items():
        results |= {f"{name}:{key}": value for key, value in fit(engine, job).items()}
    return results
