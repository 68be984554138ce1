"""The trainer on tiny scenes: what it logs, what stops it, and that a resumed run is the same run."""

import csv
import json
from dataclasses import replace

import lightning
import pytest
import torch

from longclip import callbacks, models, runs
from longclip.captions import Groups, Sentences, Whole
from longclip.checkpoints import Checkpoints
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.objectives import Contrastive, Grouping, Loss, TextConditioned
from longclip.optim import AdamW
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import UserError

SAMPLES, BATCH = 128, 16


def parts(
    scenes, tiny, terms=None, precision="32-true", run=None, samples=SAMPLES, extra=(), plan=None, ema=None
):
    torch.manual_seed(0)
    tower = DualTower(build(tiny, None, 248))
    groups = Groups({"long": Whole(), "sub": Sentences(3)}, seed=0)
    terms = terms or {"long": Contrastive("long"), "sub": Contrastive("sub"), "grouping": Grouping("sub")}
    optim = AdamW(lr=1e-3, warmup=32, samples=samples, ema=ema)
    module = LongClip(tower, terms, groups.slots, optim, seed=0)
    data = DataModule(
        root=scenes, train="train", judge=["heldout"], plan=plan or Plan(samples, BATCH), groups=groups,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg, workers=0,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=samples // BATCH, max_epochs=-1, logger=False, precision=precision,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, gradient_clip_val=1.0, log_every_n_steps=2, default_root_dir=run,
        callbacks=list(extra),
    )  # fmt: skip
    return trainer, module, data


def saver(run, every_steps=0, resume=None, keep=2):
    return Checkpoints(run, every_steps=every_steps, every_minutes=0, keep=keep, resume=resume)


def going_on(run):
    return saver(run, resume=runs.newest_checkpoint(run))


class Watch(lightning.Callback):
    """Keeps the keys and losses of every step, and may stop after some."""

    def __init__(self, stop_after=None):
        self.keys, self.losses, self.stop_after = [], [], stop_after

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.keys.append(batch.keys)
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True


def test_the_loss_falls_and_every_sample_is_counted(scenes, tiny):
    watch = Watch()
    trainer, module, data = parts(scenes, tiny, samples=320, extra=[watch])
    trainer.fit(module, data)
    assert module.samples_seen == 320
    assert len(watch.losses) == 20
    assert sum(watch.losses[-4:]) < sum(watch.losses[:4])
    first_epoch = [key for keys in watch.keys[:6] for key in keys]
    assert len(set(first_epoch)) == 96


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumed_equals_uninterrupted_bit_by_bit(scenes, tiny, tmp_path, precision):
    whole = Watch()
    trainer, module, data = parts(scenes, tiny, precision=precision, extra=[whole])
    trainer.fit(module, data)

    cut = Watch(stop_after=5)
    saves = saver(tmp_path, 5)
    trainer, _, _ = parts(scenes, tiny, precision=precision, extra=[saves, cut])
    _, half, data = parts(scenes, tiny)
    trainer.fit(half, data)

    rest = Watch()
    trainer, resumed, data = parts(scenes, tiny, precision=precision, extra=[going_on(tmp_path), rest])
    trainer.fit(resumed, data)
    assert cut.keys + rest.keys == whole.keys
    assert cut.losses + rest.losses == whole.losses
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_in_chunks_is_the_same_run_and_may_go_on_in_others(scenes, tiny, tmp_path):
    whole = Watch()
    trainer, module, data = parts(scenes, tiny, samples=64, extra=[whole])
    trainer.fit(module, data)
    cut, rest = Watch(stop_after=2), Watch()
    trainer, half, data = parts(scenes, tiny, samples=64, extra=[saver(tmp_path, 2), cut])
    half.micro_batch = 5
    trainer.fit(half, data)
    trainer, resumed, data = parts(scenes, tiny, samples=64, extra=[going_on(tmp_path), rest])
    resumed.micro_batch = 8
    trainer.fit(resumed, data)
    assert cut.keys + rest.keys == whole.keys
    assert cut.losses + rest.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.parametrize("plan", [{"batches": "balanced"}, {"batches": "similar", "tokens": 1300}])
def test_composed_batches_and_a_budget_resume_bit_by_bit(scenes, tiny, tmp_path, plan):
    plan = Plan(SAMPLES, BATCH, pool=2, **plan)
    whole = Watch()
    trainer, module, data = parts(scenes, tiny, extra=[whole], plan=plan)
    trainer.fit(module, data)
    assert module.samples_seen == SAMPLES
    assert len(whole.losses) == trainer.max_steps
    assert len({len(keys) for keys in whole.keys}) > (plan.tokens is not None)

    cut = Watch(stop_after=5)
    saves = saver(tmp_path, 5)
    trainer, half, data = parts(scenes, tiny, extra=[saves, cut], plan=plan)
    trainer.fit(half, data)

    rest = Watch()
    trainer, resumed, data = parts(scenes, tiny, extra=[going_on(tmp_path), rest], plan=plan)
    trainer.fit(resumed, data)
    assert cut.keys + rest.keys == whole.keys
    assert cut.losses + rest.losses == whole.losses


def test_a_resume_with_another_batch_size_goes_on_at_the_same_sample(scenes, tiny, tmp_path):
    saves = saver(tmp_path, 3)
    trainer, module, data = parts(scenes, tiny, samples=48, extra=[saves])
    trainer.fit(module, data)
    rest = Watch()
    trainer, module, data = parts(scenes, tiny, extra=[going_on(tmp_path), rest])
    data.plan = replace(data.plan, batch_size=8)
    trainer.fit(module, data)
    assert [len(keys) for keys in rest.keys] == [8] * 10
    assert module.samples_seen == SAMPLES
    whole = Watch()
    trainer, module, data = parts(scenes, tiny, extra=[whole])
    trainer.fit(module, data)
    assert [k for keys in rest.keys for k in keys] == [k for keys in whole.keys for k in keys][48:]


def test_checkpoint_holds_plain_types_and_is_complete_on_its_own(scenes, tiny, tmp_path):
    saves = saver(tmp_path, 2)
    trainer, module, data = parts(scenes, tiny, extra=[saves])
    trainer.fit(module, data)
    assert [p.name for p in runs.checkpoints(tmp_path)] == [runs.checkpoint_name(6), runs.checkpoint_name(8)]
    content = models.read_checkpoint(runs.newest_checkpoint(tmp_path))
    assert json.dumps(content["longclip"])
    backbone = models.load(str(runs.newest_checkpoint(tmp_path)))
    trained = module.tower.backbone.state_dict()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(trained[name].reshape(value.shape), value), name
    assert not any("grouping" in name for name in backbone.model.state_dict())
    # 20 rows are kept, the others taken twice.
    longer = models.load(str(runs.newest_checkpoint(tmp_path)), context_length=476)
    assert (longer.tokenizer.context_length, len(longer.model.positional_embedding)) == (476, 476)
    assert torch.equal(longer.model.positional_embedding[:20], backbone.model.positional_embedding[:20])


class Broken(Contrastive):
    """Turns to NaN at the third step."""

    calls = 0

    def forward(self, embeddings):
        self.calls += 1
        loss = super().forward(embeddings)
        return Loss(loss.value * (float("nan") if self.calls == 3 else 1), loss.measures)


def test_a_nan_stops_with_step_term_and_keys_and_leaves_the_last_checkpoint(scenes, tiny, tmp_path):
    saves = saver(tmp_path, 2)
    trainer, module, data = parts(
        scenes, tiny, terms={"fine": Contrastive("sub"), "odd": Broken("long")}, extra=[saves]
    )
    with pytest.raises(UserError, match=r"step 2 \(odd = nan\).*train-0"):
        trainer.fit(module, data)
    assert runs.newest_checkpoint(tmp_path).name == runs.checkpoint_name(2)


def test_a_checkpoint_of_another_architecture_is_refused(scenes, tiny, tmp_path):
    saves = saver(tmp_path, 2)
    trainer, module, data = parts(scenes, tiny, extra=[saves], samples=32)
    trainer.fit(module, data)
    trainer, module, data = parts(
        scenes, tiny, terms={"long": Contrastive("long")}, extra=[going_on(tmp_path)]
    )
    with pytest.raises(UserError, match="another architecture or recipe"):
        trainer.fit(module, data)


def test_a_full_disk_is_a_sentence(scenes, tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    saves = saver(tmp_path, 2)
    trainer, module, data = parts(scenes, tiny, extra=[saves])
    monkeypatch.setattr("longclip.stored.save_file", full)
    with pytest.raises(UserError, match=r"no space left for the checkpoint.*resume=auto"):
        trainer.fit(module, data)


def test_a_term_that_names_no_group_is_refused(scenes, tiny):
    with pytest.raises(UserError, match=r"'lnog'.*groups are long, sub"):
        parts(scenes, tiny, terms={"long": Contrastive("lnog")})


def test_accumulation_is_refused_because_it_does_not_enlarge_the_batch(scenes, tiny):
    trainer, module, data = parts(scenes, tiny)
    trainer.accumulate_grad_batches = 2
    with pytest.raises(UserError, match=r"does not enlarge the contrastive batch.*micro_batch=32"):
        trainer.fit(module, data)


def test_a_terms_head_fits_the_model_and_is_trained_beside_it(scenes, tiny):
    terms = {"sub": TextConditioned("sub", heads=4)}
    trainer, module, data = parts(scenes, tiny, terms, precision="bf16-mixed", samples=32)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit(module, data)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("terms.sub.")} <= changed
    assert "terms.sub.head.attention.in_proj_weight" in changed
    assert not any("head" in name for name in module.tower.backbone.state_dict())


def test_what_is_logged(scenes, tiny, tmp_path):
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name="csv", version="")
    trainer, module, data = parts(scenes, tiny, extra=[callbacks.Telemetry()])
    trainer.loggers = [logger]
    trainer.fit(module, data)
    with open(next(tmp_path.rglob("metrics.csv"))) as f:
        rows = list(csv.DictReader(f))
    names = "train/loss train/long train/sub train/grouping train/grouping/entropy scale lr samples_seen"
    names += (
        " samples_per_second data_time tokens_per_sample truncated_captions truncated_tokens packing_fill"
    )
    assert set(names.split()) <= set(rows[0])
    assert [float(row["data/train/samples"]) for row in rows] == [32, 64, 96, 128]
    assert [int(row["samples_seen"].split(".")[0]) for row in rows] == [32, 64, 96, 128]


def test_a_process_without_its_batch_stops_before_the_update(scenes, tiny):
    _, module, data = parts(scenes, tiny)
    data.resume(0, 0)
    batch = next(iter(data.train_dataloader()))
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(UserError, match=r"^the shard is gone$"):
        module.training_step(batch._replace(fault="the shard is gone"), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
