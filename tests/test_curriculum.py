"""Stages of a run: a pure function of the position, the same for data and tower, or refused."""

from pathlib import Path

import hydra
import lightning
import pytest
import torch

from conf.launch import CONF, instantiate
from longclip import callbacks, runs
from longclip.captions import Groups, Sentences, Whole
from longclip.checkpoints import Checkpoints
from longclip.curriculum import Curriculum, Stage
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.objectives import Contrastive, Grouping
from longclip.optim import AdamW
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import UserError

SAMPLES, BATCH = 96, 8
STAGES = Curriculum(
    SAMPLES,
    image_size=[(0, 12), (0.5, None)],
    context_length=[(0, 20), (0.75, None)],
    patch_dropout=[(0, 0.5), (0.25, 0.75), (0.8, None)],
)


def test_a_stage_holds_from_its_share_of_the_samples_on():
    stages = Curriculum(1000, image_size=[(0, 48), (0.8, None)], patch_dropout=[(0.0, 0.5), (0.9, 0)])
    assert stages.at(0) == Stage(48, None, 0.5)
    assert stages.at(799) == Stage(48, None, 0.5)
    assert stages.at(800) == Stage(None, None, 0.5)
    assert stages.at(900) == Stage(None, None, 0)
    assert stages.at(10_000) == Stage(None, None, 0), "the last stage has no end"
    assert Curriculum(1000).at(500) == Stage(None, None, None)
    assert (
        stages.describe()
        == "image_size 48 from 0 %, as the model from 80 %; patch_dropout 0.5 from 0 %, 0 from 90 %"
    )
    assert Curriculum(1000).describe() == ""


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"image_size": [(0.1, 48)]}, "from 0 on"),
        ({"image_size": [(0, 48), (0.8, 60), (0.5, 72)]}, "each later"),
        ({"image_size": [(0, 48), (0.8, 60), (0.8, 72)]}, "each later"),
        ({"image_size": [(0, 48), (1.0, 72)]}, "each later"),
        ({"image_size": []}, "from 0 on"),
        ({"image_size": [48, 72]}, "for every stage"),
        ({"image_size": 48}, "for every stage"),
        ({"image_size": {0.0: 48}}, "for every stage"),
        ({"image_size": [("now", 48)]}, "for every stage"),
        ({"image_size": [(0, 48.5)]}, "a number of pixels"),
        ({"image_size": [(0, "small")]}, "a number of pixels"),
        ({"context_length": [(0, 0)]}, "start and end included"),
        ({"context_length": [(0, True)]}, "start and end included"),
        ({"context_length": [(0, 2)]}, "start and end included"),
        ({"patch_dropout": [(0, 1.0)]}, "below 1"),
        ({"patch_dropout": [(0, -0.5)]}, "below 1"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages, words):
    with pytest.raises(UserError, match=words):
        Curriculum(1000, **stages)


def test_stages_beyond_the_model_are_refused():
    with pytest.raises(UserError, match=r"image_size has a stage of 96, and the model has 72"):
        Curriculum(1000, image_size=[(0, 96)]).check_model(72, 248)
    with pytest.raises(UserError, match=r"context_length has a stage of 300, and the model has 248"):
        Curriculum(1000, context_length=[(0, 300)]).check_model([72, 72], 248)
    Curriculum(1000, image_size=[(0, 72)], context_length=[(0, 248)]).check_model(72, 248)


class Watch(lightning.Callback):
    """Keeps what the steps saw, and may stop after some."""

    def __init__(self, stop_after=None):
        self.steps, self.stop_after = [], stop_after

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        dropout = module.tower.backbone.visual.patch_dropout.prob
        self.steps.append((batch.pixels_BCHW.shape[-1], batch.longest, dropout, float(outputs["loss"])))
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True


def fit(scenes, architecture, stages, samples=SAMPLES, extra=(), micro_batch=None):
    """One training of a tiny tower; returns the module."""
    torch.manual_seed(0)
    tower = DualTower(build(architecture, None, 248, patch_dropout=0.25))
    groups = Groups({"long": Whole(), "sub": Sentences(2)}, seed=0)
    terms = {"long": Contrastive("long"), "grouping": Grouping("sub")}
    optim = AdamW(lr=1e-3, warmup=16, samples=samples)
    module = LongClip(tower, terms, groups.slots, optim, seed=0, micro_batch=micro_batch)
    data = DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(samples, BATCH), groups=groups,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg, workers=0, curriculum=stages,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=samples // BATCH, max_epochs=-1, logger=False, precision="32-true",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, log_every_n_steps=2, callbacks=[callbacks.Stages(stages), *extra],
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def test_every_step_is_made_and_trained_at_its_stage(scenes, tiny):
    watch = Watch()
    module = fit(scenes, tiny, STAGES, extra=[watch])
    sizes, longest, dropouts, losses = zip(*watch.steps, strict=True)
    assert sizes == (12,) * 6 + (24,) * 6
    assert longest[:9] == (20,) * 9
    assert min(longest[9:]) > 50, "the paragraphs are whole again"
    assert dropouts == (0.5,) * 3 + (0.75,) * 7 + (0.25,) * 2, "at the end as the model was built"
    assert torch.tensor(losses).isfinite().all()
    assert module.tower.backbone.visual.positional_embedding.shape == (5, 32), (
        "the table stays the tower's own"
    )


@pytest.mark.parametrize(("stop", "micro_batch"), [(4, None), (6, 4)])  # inside a stage, and between two
def test_resumed_equals_uninterrupted_bit_by_bit(scenes, tiny, tmp_path, stop, micro_batch):
    whole, cut, rest = Watch(), Watch(stop_after=stop), Watch()
    module = fit(scenes, tiny, STAGES, extra=[whole], micro_batch=micro_batch)
    saver = Checkpoints(tmp_path, every_steps=stop, every_minutes=0, keep=9)
    fit(scenes, tiny, STAGES, extra=[saver, cut], micro_batch=micro_batch)
    restorer = Checkpoints(tmp_path, 0, 0, keep=9, resume=runs.newest_checkpoint(tmp_path))
    resumed = fit(scenes, tiny, STAGES, extra=[restorer, rest], micro_batch=micro_batch)
    assert cut.steps + rest.steps == whole.steps
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_tower_that_cannot_follow_is_refused_before_the_first_step(scenes, tiny):
    watch = Watch()
    for size, words in ((18, "no multiple of this tower's patches of 12"), (36, "the model has 24")):
        with pytest.raises(UserError, match=words):
            fit(scenes, tiny, Curriculum(SAMPLES, image_size=[(0, size)]), extra=[watch])
    assert not watch.steps


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "curriculum").glob("*.yaml")))
def test_every_file_composes_and_trains(scenes, choice):
    samples = 5 * BATCH
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"curriculum={choice}", f"samples={samples}"])
    stages, watch = instantiate(config.curriculum), Watch()
    assert isinstance(stages, Curriculum)
    fit(scenes, config.model.backbone.architecture, stages, samples, extra=[watch])
    assert len(watch.steps) == 5
    assert watch.steps[-1][0] == 72, "every file ends with whole images"
    changed = {(size, dropout) for size, _, dropout, _ in watch.steps}
    assert (len(changed) == 1) == (choice == "none")


def test_stages_are_given_on_the_command_line_as_a_list():
    override = "curriculum.image_size=[[0,48],[0.8,null]]"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        stages = instantiate(
            hydra.compose("train", overrides=["curriculum=clipa", override, "samples=100"]).curriculum
        )
    assert stages.at(79).image_size == 48
    assert stages.at(80).image_size is None
    assert Path(CONF / "curriculum" / "none.yaml").exists()
