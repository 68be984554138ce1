"""Batches: the same stream whatever the workers, processes, batch size or interruption."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import open_clip
import pytest
import simplejpeg
import torch
from open_clip.transform import image_transform
from PIL import Image

from longclip import dist
from longclip.captions import First, Groups, Mix, Sentences, Whole, parse
from longclip.data.dataset import Dataset
from longclip.data.images import Augment
from longclip.data.joining import Join
from longclip.data.module import DataModule
from longclip.data.plan import Plan
from longclip.data.shards import write
from longclip.data.sidecar_writer import write_sidecar
from longclip.tokens import Tokenizer, unpack
from longclip.types import Batch, Record, UserError

SIZE, COUNT = 16, 21
PLAN: dict[str, Any] = {"samples": 60, "batch_size": 6, "block": 2, "window": 3}
PREPROCESS = {"size": SIZE, "resize_mode": "shortest", "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


def records(tokenizer: Tokenizer, count: int = COUNT) -> Iterable[Record]:
    y, x = np.mgrid[0:20, 0:24]
    for number in range(count):
        waves = [127 + 100 * np.sin((x + y * c + number) / 4) for c in range(3)]
        image = simplejpeg.encode_jpeg(np.ascontiguousarray(np.stack(waves, 2).astype(np.uint8)))
        captions = (
            parse(f"Photo {number}. It shows waves. They are soft. I like {number}.", "human", tokenizer),
            parse(f"Number {number}.", "alt", tokenizer),
        )
        box = (0.0, 0.0, 0.5, 0.5)
        first = captions[0]._replace(sentences=tuple(s._replace(box=box) for s in captions[0].sentences))
        yield Record(f"k{number}", image, "jpg", (first, captions[1]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", COUNT), ("dev", 5)):
        write(
            records(tokenizer, count), root / split, samples_per_shard=8, tokenizer_hash=tokenizer.name_hash
        )
    return root


def module(root: Path, tokenizer: Tokenizer, **changes: Any) -> DataModule:
    groups = changes.pop("groups", None) or Groups({"long": Whole(), "sub": Sentences(3)}, seed=0)
    plan = {name: changes.pop(name) for name in list(changes) if name in Plan.__dataclass_fields__}
    options: dict[str, Any] = {"train": "train", "workers": 0, "plan": Plan(**PLAN | plan)}
    options |= {
        "augment": Augment((0.3, 1.0), flip=0.5, jitter=0.2),
        "judge": ["dev"],
        "preprocess": PREPROCESS,
    }
    return DataModule(root=root, groups=groups, tokenizer=tokenizer, **options | changes)


def equal(ours: Batch, theirs: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_is_uint8_pixels_and_packed_tokens(root: Path, tokenizer: Tokenizer) -> None:
    batch = next(iter(module(root, tokenizer).train_dataloader()))
    assert batch.pixels_BCHW.shape == (6, 3, SIZE, SIZE)
    assert batch.pixels_BCHW.dtype == torch.uint8
    assert batch.lengths_BK.shape == (6, 4)
    assert len(batch.tokens_T) == int(batch.lengths_BK.sum())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, tokenizer: Tokenizer, workers: int) -> None:
    alone = list(module(root, tokenizer).train_dataloader())
    helped = list(module(root, tokenizer, workers=workers).train_dataloader())
    assert len(alone) == len(helped) == 10
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_two_epochs_show_every_image_twice_and_differently(root: Path, tokenizer: Tokenizer) -> None:
    batches = list(module(root, tokenizer, batch_size=7, samples=2 * COUNT).train_dataloader())
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys[:COUNT]) == sorted(keys[COUNT:]) == sorted(f"k{n}" for n in range(COUNT))
    assert keys[:COUNT] != keys[COUNT:]
    pixels = torch.cat([batch.pixels_BCHW for batch in batches])
    assert not torch.equal(pixels[keys.index("k3")], pixels[COUNT + keys[COUNT:].index("k3")])


def test_resume_continues_the_stream_in_the_middle_of_an_epoch(root: Path, tokenizer: Tokenizer) -> None:
    whole = list(module(root, tokenizer).train_dataloader())
    resumed = module(root, tokenizer)
    assert resumed.resume(24, 4) == 6
    loader = resumed.train_dataloader()
    rest = list(loader)
    assert len(loader) == len(whole) == 10
    assert len(rest) == 6
    assert all(equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_resume_with_another_batch_size_continues_the_same_samples(root: Path, tokenizer: Tokenizer) -> None:
    whole = torch.cat([batch.pixels_BCHW for batch in module(root, tokenizer).train_dataloader()])
    resumed = module(root, tokenizer, batch_size=4)
    assert resumed.resume(30, 5) == 7
    rest = torch.cat([batch.pixels_BCHW for batch in resumed.train_dataloader()])
    assert torch.equal(rest, whole[30:58])


def test_two_processes_together_see_the_batch_of_one(
    root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(rank: int, world: int) -> Batch:
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world", lambda: world)
        data = module(root, tokenizer)
        data.resume(12, 2)
        return next(iter(data.train_dataloader()))

    one, left, right = first(0, 1), first(0, 2), first(1, 2)
    assert left.keys + right.keys == one.keys
    assert torch.equal(torch.cat([left.pixels_BCHW, right.pixels_BCHW]), one.pixels_BCHW)
    assert torch.equal(torch.cat([left.tokens_T, right.tokens_T]), one.tokens_T)


def test_judging_is_in_stored_order_with_open_clips_preprocessing_and_ids(
    root: Path, tokenizer: Tokenizer
) -> None:
    groups = Groups({"long": Whole(), "first": First()}, seed=0, shuffle=False)
    judged = list(module(root, tokenizer).judge_batches("dev", 2, groups))
    assert [batch.keys for _, batch in judged] == [["k0", "k1"], ["k2", "k3"], ["k4"]]
    theirs = image_transform(SIZE, False, mean=(0.0,) * 3, std=(1.0,) * 3)
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    data = Dataset(root / "dev", tokenizer)
    for (samples, batch), start in zip(judged, (0, 2, 4), strict=True):
        for place, sample in enumerate(samples):
            record = data.record(start + place)
            (Path(root) / "one.jpg").write_bytes(record.image)
            pixels_CHW = theirs(Image.open(root / "one.jpg")) * 255
            assert (sample.image_CHW.float() - pixels_CHW).abs().max() <= 2.01
            assert sample.texts[1] is not None
            assert sample.texts[1].box == (0.0, 0.0, 0.5, 0.5)
        ids_SL = unpack(batch.tokens_T, batch.lengths_BK.flatten(), 77)
        texts = [data.record(start + place).captions[0].text for place in range(len(samples))]
        assert torch.equal(ids_SL[::2], tokenize(texts))


def keys_of(data: DataModule) -> list[str]:
    return [key for batch in data.train_dataloader() for key in batch.keys]


def test_sources_are_mixed_by_weight_and_reported(root: Path, tokenizer: Tokenizer) -> None:
    train = {"big": {"folder": "train"}, "small": {"folder": "dev", "weight": 3}}
    data = module(root, tokenizer, train=train, samples=3 * 36)
    data.setup("fit")
    reports = {report.name: report for report in data.report()}
    assert data.epoch_size == COUNT + 3 * 5
    assert [reports[name].epoch for name in train] == [COUNT, 15]
    assert reports["small"].passes == pytest.approx(108 / 36 * 3)
    keys = keys_of(data)
    own = Counter(f"k{n}" for n in range(COUNT))
    assert Counter(keys[:36]) == own + Counter({f"k{n}": 3 for n in range(5)})
    assert data.shown(36) == {"big": 21, "small": 15}


def test_an_epoch_in_samples_is_shared_out_by_weight(root: Path, tokenizer: Tokenizer) -> None:
    train = {"big": {"folder": "train"}, "small": {"folder": "dev", "weight": 2.1}}
    data = module(root, tokenizer, train=train, epoch=10)
    assert [report.epoch for report in data.report()] == [7, 3]
    with pytest.raises(UserError, match=r"data.plan.epoch=1 samples leave none for small"):
        module(root, tokenizer, train=train, epoch=1).report()


def test_a_sources_order_does_not_depend_on_the_others(root: Path, tokenizer: Tokenizer) -> None:
    big, small, more = ({"folder": name} for name in ("train", "dev", "train"))
    two = module(root, tokenizer, train={"big": big, "small": small}).mixture
    three = module(root, tokenizer, train={"more": more, "big": big, "small": small}).mixture
    assert two.parts[0].order == three.parts[1].order
    assert three.parts[0].order != three.parts[1].order


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "names no source"),
        ({"a": "train"}, r"source 'a' of data.train is 'train'"),
        ({"a": {"weight": 1}}, r"missing 1 required positional argument: 'folder'"),
        ({"a": {"folder": "train", "wieght": 1}}, r"unexpected keyword argument 'wieght'.*\{folder: FOLDER"),
        ({"a": {"folder": "train", "weight": 0}}, r"weight a number above 0"),
        ({"a": {"folder": "train", "weight": "much"}}, r"could not convert"),
    ],
)
def test_sources_that_are_none_are_one_sentence(
    train: Any, message: str, root: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match=message):
        module(root, tokenizer, train=train)


@pytest.fixture
def facts(tmp_path: Path, tokenizer: Tokenizer) -> str:
    rows = [
        {"key": f"k{n}", "score": n, "half": n % 2, "teacher": [n, -n], "vecap": "A wave."} for n in range(18)
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sidecar(tmp_path / "facts.jsonl", tmp_path / "facts", tokenizer)
    return str(tmp_path / "facts")


def test_side_cars_filter_add_captions_and_ride_along(root: Path, tokenizer: Tokenizer, facts: str) -> None:
    join = Join([facts], filter={"score": {"at_least": 8}}, columns=["teacher"])
    groups = Groups({"extra": Whole("vecap"), "own": Whole("human")}, seed=0)
    data = module(root, tokenizer, sidecar=join, groups=groups, samples=30, batch_size=5)
    batches = list(data.train_dataloader())
    assert Counter(key for batch in batches for key in batch.keys) == {f"k{n}": 3 for n in range(8, 18)}
    for batch in batches:
        numbers = [int(key[1:]) for key in batch.keys]
        assert batch.columns["teacher"].tolist() == [[n, -n] for n in numbers]
        assert (batch.lengths_BK[:, 0] == len(tokenizer.ids("a wave.")) + 2).all()
    (report,) = data.report()
    assert (report.samples, report.kept, report.joined) == (COUNT, 10, {facts: pytest.approx(18 / COUNT)})


@pytest.mark.parametrize("batches", ["similar", "balanced", "half"])
@pytest.mark.parametrize("world", [1, 3])
def test_composed_batches_show_the_same_samples_to_any_number_of_processes(
    batches: str, world: int, root: Path, tokenizer: Tokenizer, facts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(world: int, position: int = 0) -> list[list[str]]:
        ranks = []
        monkeypatch.setattr(dist, "world", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            data = module(root, tokenizer, sidecar=Join([facts]), batches=batches, pool=2, samples=63)
            data.resume(position, position // 6)
            ranks.append([batch.keys for batch in data.train_dataloader()])
        return [[key for part in step for key in part] for step in zip(*ranks, strict=True)]

    whole = steps(world)
    assert whole == steps(1)
    assert whole[4:] == steps(world, 24)
    first = [key for step in whole for key in step][:COUNT]
    assert sorted(first) == sorted(f"k{n}" for n in range(COUNT))


def test_tokens_bound_a_step(root: Path, tokenizer: Tokenizer) -> None:
    data = module(root, tokenizer, tokens=100, samples=40)
    left = data.resume(0, 0)
    batches = list(data.train_dataloader())
    assert len(batches) == left > 40 // 6
    assert sum(len(batch.keys) for batch in batches) == 40
    assert all(int(batch.lengths_BK[:, 0].sum()) <= 100 for batch in batches)


def test_the_mix_of_captions_moves_over_the_run(root: Path, tokenizer: Tokenizer) -> None:
    mix = Mix({"alt": Whole("alt"), "long": Whole("human")}, {"alt": 1, "long": 0}, {"alt": 0, "long": 1})
    data = module(root, tokenizer, groups=Groups({"one": mix}, seed=0), samples=600)
    lengths = torch.cat([batch.lengths_BK[:, 0] for batch in data.train_dataloader()])
    long = (lengths > 10).float().reshape(4, -1).mean(1)
    assert long.tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.12)


def test_a_resume_of_another_order_is_said(
    root: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    before = json.loads(json.dumps(module(root, tokenizer).signature()))
    module(root, tokenizer, batch_size=4, samples=90).resume(24, 4, before)
    assert not caplog.messages
    module(root, tokenizer, seed=1, train="dev", batch_size=4).resume(24, 4, before)
    assert "seed 0 -> 1" in caplog.text
    assert "{'train': [21, 21]} -> {'dev': [5, 5]}" in caplog.text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"share": 0}, r"data.plan.share is 0"),
        ({"tokens": 0}, r"data.plan.tokens is 0"),
        ({"pool": 0, "batches": "similar"}, r"data.plan.pool is 0"),
        (
            {"batches": "cluster"},
            r"no column 'cluster' of kind label or number; they have none: data.sidecar",
        ),
        ({"tokens": 5}, r"data.plan.tokens=5 is less than one image"),
    ],
)
def test_plans_that_cannot_be_are_one_sentence(
    plan: Any, message: str, root: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match=message):
        module(root, tokenizer, **plan).resume(0, 0)


def test_setup_opens_every_folder_first(root: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="nowhere is no folder of shards"):
        module(root, tokenizer, judge=["dev", "nowhere"]).setup("fit")
    data = module(root, tokenizer)
    data.setup("fit")
    assert data.epoch_size == COUNT
    assert data.probe(5).keys == next(iter(data.train_dataloader())).keys[:5]


def test_prepare_is_given_the_root(root: Path, tokenizer: Tokenizer) -> None:
    called: list[object] = []
    data = module(root, tokenizer, prepare=lambda path, tokenizer: called.extend([path, tokenizer]))
    data.prepare_data()
    assert called == [root, tokenizer]


def test_image_that_is_not_square_is_refused(root: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="are not square"):
        module(root, tokenizer, preprocess=PREPROCESS | {"size": [16, 32]})


class Recorder(lightning.LightningModule):
    """Trains one number, remembers the keys and keeps the data position as a training does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.keys, self.position = torch.nn.Parameter(torch.zeros(())), [], 0

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.keys += batch.keys
        self.position += len(batch.keys)
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self.position

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.position = checkpoint["position"]
        self.trainer.datamodule.resume(self.position, checkpoint["global_step"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [6, 4])
@pytest.mark.filterwarnings("error:.*resumable.*")
def test_lightning_trains_what_is_left_after_a_resume(
    root: Path, tokenizer: Tokenizer, tmp_path: Path, workers: int, batch_size: int
) -> None:
    def fit(steps: int, batch_size: int, checkpoint: Path | None = None) -> Recorder:
        recorder, data = Recorder(), module(root, tokenizer, workers=workers, batch_size=batch_size)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(recorder, data, ckpt_path=checkpoint, weights_only=True)
        if checkpoint is None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
        return recorder

    whole, half = fit(10, 6), fit(4, 6)
    steps = 4 + 36 // batch_size
    rest = fit(steps, batch_size, tmp_path / "4.ckpt")
    assert half.keys + rest.keys == whole.keys
