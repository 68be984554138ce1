"""Batches: the same stream whatever the workers, processes, batch size or interruption."""

import random
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from waves import COUNT, PREPROCESS, SIZE, module

from longclip import dist
from longclip.captions import First, Groups, Whole, parse
from longclip.data.images import Augment
from longclip.data.loading import seeding
from longclip.data.tars.dataset import Dataset
from longclip.tokens import Tokenizer, unpack
from longclip.types import Batch, UserError


def equal(ours: Batch, theirs: Batch) -> bool:
    return all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, torch.Tensor) else a == b
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


def test_the_view_of_an_image_says_nothing_of_the_captions_that_are_shown(tokenizer: Tokenizer) -> None:
    """Two captions against four quarters of the crop's area: 1,000 images, about 125 each."""
    captions = [parse(f"{word} is here.", word, tokenizer) for word in ("one", "two")]
    groups, augment = Groups({"any": Whole()}, seed=0), Augment(scale=(0.2, 1.0))
    first = groups.show(captions[:1], "k", 0)[0].ids
    counts = np.zeros((2, 4), int)
    for number in range(1000):
        left, top, right, bottom = augment.window(100, 100, random.Random(seeding(0, 0, f"k{number}")))
        quarter = min(3, int(4 * ((right - left) * (bottom - top) - 0.2) / 0.8))
        counts[int(list(groups.show(captions, f"k{number}", 0)[0].ids) != list(first)), quarter] += 1
    assert (abs(counts - counts.sum(0) / 2) < 40).all(), counts
