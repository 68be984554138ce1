"""A run's way through its data: sources, side-cars, composed batches, budgets, schedules, and a resume."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import COUNT, module

from longclip import dist
from longclip.captions import Groups, Mix, Whole
from longclip.data.module import DataModule
from longclip.data.sidecars.joining import Join
from longclip.data.sidecars.writer import write_sidecar
from longclip.tokens import Tokenizer
from longclip.types import UserError


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
        (["train", "train"], r"data.train is \['train', 'train'\]; write data.train=FOLDER or"),
        ({"a": "train"}, r"source 'a' of data.train is 'train'"),
        ({"a": {"weight": 1}}, r"missing 1 required positional argument: 'folder'"),
        ({"a": {"folder": "train", "wieght": 1}}, r"unexpected keyword argument 'wieght'.*\{folder: FOLDER"),
        ({"a": {"folder": "train", "weight": 0}}, r"weight a number above 0"),
        ({"a": {"folder": "train", "weight": "much"}}, r"could not convert"),
        ({"a": {"folder": "train", "sidecar": {"store": []}}}, r"unexpected keyword argument 'store'"),
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


def test_a_source_may_have_a_side_car_of_its_own(root: Path, tokenizer: Tokenizer, facts: str) -> None:
    own = {"stores": [facts], "filter": {"score": {"top": 0.5}}}
    train = {"filtered": {"folder": "train", "sidecar": own}, "all": {"folder": "train"}}
    data = module(root, tokenizer, train=train)
    assert {report.name: report.kept for report in data.report()} == {"filtered": 9, "all": COUNT}
    train["filtered"]["sidecar"] = own | {"columns": ["score"]}
    with pytest.raises(UserError, match=r"differ between the sources \(filtered \['score'\], all \[\]\)"):
        module(root, tokenizer, train=train).report()


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


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sidecar": {"filter": {"score": {"bottom": 0.5}}}}, "chosen"),
        ({"sidecar": {"weight": "other"}}, "chosen"),
        ({"sidecar": {"weight": "half"}}, "chosen"),
        ({"batches": "other"}, "batches half -> other"),
        ({}, None),
    ],
)
def test_a_resume_says_that_other_samples_are_chosen(
    changed: Any, words: str | None, root: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: Any
) -> None:
    rows = [{"key": f"k{n}", "score": n, "half": 1 + n % 2, "other": 2 - n % 2} for n in range(COUNT)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sidecar(tmp_path / "facts.jsonl", tmp_path / "facts", tokenizer)

    def made(sidecar: Any = None, batches: str = "half") -> DataModule:
        join = Join([str(tmp_path / "facts")], **({"filter": {"score": {"top": 0.5}}} | (sidecar or {})))
        return module(root, tokenizer, sidecar=join, batches=batches)

    before = made().signature()
    made(**changed).resume(12, 2, json.loads(json.dumps(before)))
    assert bool(caplog.messages) == (words is not None)
    assert not words or words in caplog.text
    caplog.clear()
    made(**changed).resume(12, 2, {name: before[name] for name in ("seed", "sources")})
    assert not caplog.messages, "what an older checkpoint does not say is not compared"
