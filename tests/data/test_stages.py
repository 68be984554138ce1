"""Batches of a curriculum: cut as their stage says, whoever makes them, and honest about what was cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from waves import SIZE, module

from longclip import dist
from longclip.callbacks import token_counts
from longclip.captions import Groups, Whole
from longclip.curriculum import Curriculum
from longclip.data.images import Augment
from longclip.data.module import DataModule
from longclip.tokens import Tokenizer
from longclip.types import Batch

SAMPLES = 60
STAGES = Curriculum(
    SAMPLES, image_size=[(0, 8), (0.45, None)], context_length=[(0, 9), (0.3, 12), (0.8, None)]
)


def staged(root: Path, tokenizer: Tokenizer, **options: Any) -> DataModule:
    groups = Groups({"long": Whole("human")}, seed=0)
    return module(root, tokenizer, **{"curriculum": STAGES, "groups": groups} | options)


def batches(root: Path, tokenizer: Tokenizer, **options: Any) -> list[Batch]:
    return list(staged(root, tokenizer, **options).train_dataloader())


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(
        torch.equal(a.pixels_BCHW, b.pixels_BCHW) and torch.equal(a.tokens_T, b.tokens_T) and a.keys == b.keys
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_has_the_stage_of_its_first_position(root: Path, tokenizer: Tokenizer) -> None:
    found = batches(root, tokenizer)
    assert [batch.pixels_BCHW.shape[-1] for batch in found] == [8] * 5 + [SIZE] * 5  # 27 is in the fifth
    assert [batch.longest for batch in found[:8]] == [9] * 3 + [12] * 5
    assert all(batch.longest > 12 for batch in found[8:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, tokenizer: Tokenizer, workers: int) -> None:
    assert same(batches(root, tokenizer), batches(root, tokenizer, workers=workers))


def test_processes_change_nothing(root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shares = batches(root, tokenizer), []
    monkeypatch.setattr(dist, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(batches(root, tokenizer))
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert batch.keys == [key for part in parts for key in part.keys]
        assert torch.equal(batch.pixels_BCHW, torch.cat([part.pixels_BCHW for part in parts]))
        assert torch.equal(batch.tokens_T, torch.cat([part.tokens_T for part in parts]))


@pytest.mark.parametrize("steps", [2, 5])  # inside a stage, and between two
def test_a_resumed_run_goes_on_in_its_stage(root: Path, tokenizer: Tokenizer, steps: int) -> None:
    resumed = staged(root, tokenizer)
    resumed.resume(6 * steps, steps)
    assert same(batches(root, tokenizer)[steps:], list(resumed.train_dataloader()))


def test_a_budget_of_tokens_keeps_the_stages(root: Path, tokenizer: Tokenizer) -> None:
    found, position = batches(root, tokenizer, tokens=80), 0
    assert {len(batch.keys) for batch in found} == {4}, "so that stages begin in the middle of batches"
    for batch in found:
        assert batch.pixels_BCHW.shape[-1] == (STAGES.at(position).image_size or SIZE)
        position += len(batch.keys)


def test_small_images_are_the_same_crops(root: Path, tokenizer: Tokenizer) -> None:
    augment = Augment((0.3, 0.5), flip=0.5)
    small, large = (
        batches(root, tokenizer, augment=augment, curriculum=stages)[0].pixels_BCHW.float()
        for stages in (STAGES, None)
    )
    shrunk = torch.nn.functional.interpolate(large, (8, 8), mode="bicubic", antialias=True)
    assert (small - shrunk).abs().mean() < 8, "another crop or mirror image would differ by dozens of levels"


def test_what_a_stage_leaves_out_is_not_called_truncation(root: Path, tokenizer: Tokenizer) -> None:
    short, whole = batches(root, tokenizer)[0], batches(root, tokenizer, curriculum=None)[0]
    assert int(short.dropped_BK.sum()) == int(whole.dropped_BK.sum()) == 0
    assert whole.withheld == 0
    assert short.withheld == len(whole.tokens_T) - len(short.tokens_T) > 0
    counts = token_counts(short)
    assert counts["truncated_captions"] == counts["truncated_tokens"] == 0
    assert counts["withheld_tokens"] == short.withheld / len(whole.tokens_T)


def test_judging_and_the_first_look_are_whole(root: Path, tokenizer: Tokenizer) -> None:
    data = staged(root, tokenizer)
    groups = Groups({"long": Whole()}, seed=0, shuffle=False)
    for batch in (data.probe(4), *(batch for _, batch in data.judge_batches("dev", 4, groups))):
        assert batch.pixels_BCHW.shape[-1] == SIZE
        assert batch.longest > 12
        assert batch.withheld == 0
