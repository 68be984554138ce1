"""Damage of every kind: found, named, counted, replaced the same way everywhere, and too much of it stops."""

import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from photos import described, handmade, jpeg, make, module, record, records, tokenizer
from processes import Results, spawn

from longclip import callbacks, dist
from longclip.data.faults import Damaged, Ledger, Reason
from longclip.data.loading import picture
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.index import read_index
from longclip.types import Skip, UserError

COUNT = 24


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes that would be ten gigabytes of pixels."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def flip(tar: Path, sample: int, at: int = 600, bit: int = 3) -> None:
    """One bit of a sample, on the disk."""
    content, offset = bytearray(tar.read_bytes()), read_index(tar).offsets[sample]
    content[offset + at] ^= 1 << bit
    tar.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "train", list(records(COUNT)))


def found(data, index):
    with pytest.raises(Damaged) as caught:
        picture(data, index)
    assert "\n" not in str(caught.value)
    assert data.shard(index) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("at", [0, 100, 156, 300, 600, 1300])
def test_a_flipped_bit_anywhere_is_found(folder, at):
    flip(folder / "000001.tar", 2, at)
    data = Dataset(folder, tokenizer())
    error = found(data, 10)
    assert error.reason is Reason.BYTES
    assert "sample 2 of" in str(error)
    assert [data.record(index) for index in (9, 11)] == [record(9), record(11)]


def test_a_tar_that_was_cut_is_found_at_the_start_or_while_reading(folder):
    data, tar = Dataset(folder, tokenizer()), folder / "000002.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    assert found(data, COUNT - 1).reason is Reason.CUT
    assert data.record(0) == record(0)
    with pytest.raises(UserError, match=r"000002\.tar has \d+ bytes, its index says \d+"):
        Dataset(folder)


GOOD = {"jpg": jpeg(0), "txt": b"A dog.", "json": described()}


@pytest.mark.parametrize(
    ("members", "reason", "words"),
    [
        (GOOD | {"jpg": jpeg(0)[:-30]}, Reason.IMAGE, "image is truncated"),
        (GOOD | {"jpg": b"GIF89a"}, Reason.IMAGE, "no JPEG, PNG or WebP"),
        ({"png": bomb(), "json": described()}, Reason.LARGE, "image is too large"),
        ({"txt": b"A dog.", "json": described()}, Reason.MEMBER, "has no image among its members"),
        ({"jpg": jpeg(0), "txt": b"A dog."}, Reason.MEMBER, "has no json among its members"),
        (GOOD | {"json+": described()}, Reason.MEMBER, "member json comes twice"),
        (GOOD | {"json": b"{"}, Reason.JSON, "is not what shards hold"),
        (GOOD | {"json": b"[" * 100_000}, Reason.JSON, "RecursionError"),
        (GOOD | {"json": b"[1, 2]"}, Reason.JSON, "TypeError"),
        (GOOD | {"json": b'{"captions": 3, "meta": {}}'}, Reason.JSON, "TypeError"),
        (GOOD | {"json": b'{"captions": [], "meta": {}}'}, Reason.JSON, "no captions"),
        (GOOD | {"json": described(text=["A", "dog"])}, Reason.JSON, "of sample 'k1'"),
        (GOOD | {"json": described(sentences=[[0, 60]])}, Reason.JSON, "outside of its caption"),
        (GOOD | {"json": described(sentences=[[-9, 6]])}, Reason.JSON, "outside of its caption"),
        (GOOD | {"json": described(counts=[1, 1]), "ids": b"\0"}, Reason.JSON, "ValueError"),
        (GOOD | {"json": described(counts=[1, 1]), "ids": b"\1\0"}, Reason.JSON, "1 ids for sentences of 2"),
        (GOOD | {"json": described(counts=[1, 1]), "ids": b"\xff" * 4}, Reason.JSON, "token id 65535"),
    ],
)
def test_what_a_faulty_tool_leaves_is_found(tmp_path, members, reason, words):
    data = Dataset(handmade(tmp_path / "train", [GOOD, members, GOOD]), tokenizer())
    assert [picture(data, index)[0].captions[0].text for index in (0, 2)] == ["A dog. It runs."] * 2
    error = found(data, 1)
    assert error.reason is reason
    assert words in str(error)


def test_a_fault_travels_between_processes():
    error = pickle.loads(pickle.dumps(Damaged("text", Reason.CUT)))
    assert (str(error), error.reason) == ("text", Reason.CUT)


def keys(batches):
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize(("workers", "batch_size"), [(2, 6), (1, 12), (0, 3)])
def test_a_damaged_sample_is_replaced_by_the_same_one_everywhere(folder, workers, batch_size):
    whole = keys(module(folder.parent).train_dataloader())
    for shard, sample in ((0, 1), (2, 7)):
        flip(folder / f"00000{shard}.tar", sample)
    alone = list(module(folder.parent, max_faults=1).train_dataloader())
    other = list(
        module(folder.parent, max_faults=1, workers=workers, batch_size=batch_size).train_dataloader()
    )
    assert keys(alone) == keys(other)
    lost = [place for place, key in enumerate(whole) if key in ("k1", "k23")]
    assert lost == [n for n, (a, b) in enumerate(zip(keys(alone), whole, strict=True)) if a != b]
    assert sum(len(batch.skips) for batch in alone) == sum(len(batch.skips) for batch in other) >= 4
    assert not {"k1", "k23"} & set(keys(alone))
    assert all(len(set(batch.keys)) == 6 for batch in alone), "a stand-in comes from another batch"


def on_a_rank(folder: Path) -> Results:
    batches = list(module(folder / "some", max_faults=1).train_dataloader())
    shown = [[int(key[1:]) for key in batch.keys] for batch in batches]
    return {"keys": torch.tensor(shown)} | one_cannot_go_on(folder) | ceiling()


def one_cannot_go_on(folder: Path) -> Results:
    """Everything is damaged for the second process."""
    steps, shapes = 0, []
    for batch in module(folder / ("all" if dist.rank() == 1 else "some")).train_dataloader():
        steps += 1
        shapes.append([*batch.pixels_BCHW.shape, *batch.lengths_BK.shape])
        if dist.anywhere(batch.fault is not None):
            break
    return {"stop": torch.tensor([steps, batch.fault is not None]), "shapes": torch.tensor(shapes)}


def ceiling() -> Results:
    ledger, reason = Ledger(0.2), Reason.CUT if dist.rank() else Reason.IMAGE
    ledger.size = 10
    ledger.add(50, [Skip(reason, "sample")] * 9)
    ledger.judge()
    below = torch.tensor(list(ledger.measures().values()))
    ledger.add(0, [Skip(reason, "sample")] * (3 * dist.rank()))
    with pytest.raises(UserError) as caught:
        ledger.judge()
    return {"below": below, "said": torch.tensor(list(str(caught.value)[:60].encode()))}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What one process, and each of two, make of the same damaged data."""
    folder = tmp_path_factory.mktemp("pair")
    for name, damaged in (("some", (8, 11, 13)), ("all", range(COUNT))):
        make(folder / name / "train", list(records(COUNT)))
        for number in damaged:
            flip(folder / name / "train" / f"00000{number // 8}.tar", number % 8)
    alone = list(module(folder / "some", max_faults=1).train_dataloader())
    (folder / "meet").mkdir()
    return keys(alone), spawn(partial(on_a_rank, folder), 2, folder / "meet")


def test_two_processes_replace_what_one_replaces(pair):
    alone, (left, right) = pair
    together = torch.cat([left["keys"], right["keys"]], dim=1).flatten().tolist()
    assert together == [int(key[1:]) for key in alone]


def test_a_process_that_cannot_go_on_stops_the_others_at_the_same_step(pair):
    _, (left, right) = pair
    assert (left["stop"].tolist(), right["stop"].tolist()) == ([1, 0], [1, 1])
    assert torch.equal(left["shapes"], right["shapes"]), "a blank batch has the shape of the others"


def test_the_ceiling_counts_all_processes_and_stops_all(pair):
    _, (left, right) = pair
    assert left["below"].tolist() == right["below"].tolist() == [18, 9, 9]
    assert bytes(left["said"].tolist()) == bytes(right["said"].tolist())
    assert b"21 of 100 samples" in bytes(left["said"].tolist())


def test_when_nothing_can_be_used_one_sentence_says_so(folder):
    for shard in range(3):
        for sample in range(8):
            flip(folder / f"00000{shard}.tar", sample)
    with pytest.raises(UserError, match="8 samples in a row cannot be used; the last one: sample"):
        list(module(folder.parent, max_faults=1, workers=1).train_dataloader())


def test_a_killed_worker_ends_the_run_with_a_sentence(folder):
    loader = module(folder.parent, samples=600, workers=1).train_dataloader()
    arriving = iter(loader)
    next(arriving)
    (worker,) = loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"a process that loads data was killed .*lower data\.workers"
    ) as caught:
        list(arriving)
    assert "\n" not in str(caught.value)


LEAVING = """
import sys, types, torch
from longclip.data.loading import _spare
from longclip.data.watching import watched

class Endless(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index): return types.SimpleNamespace(fault=None)

loader = torch.utils.data.DataLoader(Endless(), batch_size=None, num_workers=1, worker_init_fn=_spare)
batches = watched(lambda: iter(loader), [1] * 1000, None, 1, None)
next(batches)
sys.exit(2)
"""


def test_a_program_leaves_although_its_workers_hear_no_signal():
    done = subprocess.run([sys.executable, "-c", LEAVING], timeout=100, check=False)
    assert done.returncode == 2


class Trained(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.keys = torch.nn.Parameter(torch.zeros(())), []

    def on_fit_start(self):
        self.trainer.datamodule.resume(0, 0)

    def training_step(self, batch, batch_idx):
        self.keys += batch.keys
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, tmp_path, every=2):
    trained = Trained()
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name="logs", version="")
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=logger, log_every_n_steps=every,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[callbacks.Skips()],
    )  # fmt: skip
    trainer.fit(trained, data)
    logger.save()
    return trained, (tmp_path / "logs" / "metrics.csv").read_text()


def test_below_the_ceiling_a_run_trains_on_and_sums_up(folder, tmp_path, caplog):
    flip(folder / "000000.tar", 1)
    with caplog.at_level("INFO", logger="longclip"):
        trained, logged = fit(module(folder.parent, max_faults=0.2), 10, tmp_path)
    assert len(trained.keys) == 60
    header, *_, last = logged.splitlines()
    row = dict(zip(header.split(","), last.split(","), strict=True))
    assert float(row["data/skipped"]) == float(row["data/skipped/bytes"]) in (2, 3)
    summary = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("data: "))
    assert "of 60 samples could not be used" in summary
    assert "x bytes are not those of the index" in summary
    assert caplog.text.count("another is shown in its place: sample 1 of") == 1


def test_a_whole_run_says_so(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="longclip"):
        fit(module(folder.parent), 2, tmp_path)
    assert "data: all of 12 samples could be used" in caplog.text


def test_the_ceiling_stops_the_run(folder, tmp_path):
    flip(folder / "000000.tar", 1)
    with pytest.raises(
        UserError, match=r"more than data\.max_faults=0\.001 allows; the last one here: "
    ) as caught:
        fit(module(folder.parent), 10, tmp_path)
    assert "resume=auto" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ceiling_is_a_share_of_what_was_seen():
    ledger, skip = Ledger(0.001), Skip(Reason.IMAGE, "sample")
    ledger.add(100, [skip] * 10)
    ledger.judge()
    ledger.add(100, [skip])
    with pytest.raises(UserError, match=r"11 of 200 samples could not be used"):
        ledger.judge()
    ledger.add(20_000, [skip] * 9)
    ledger.judge()
    assert ledger.measures() == {"data/skipped": 20.0, "data/skipped/image": 20.0}
    with pytest.raises(UserError, match=r"data\.max_faults is 2"):
        Ledger(2)


def test_judging_is_not_mended_in_silence(folder):
    flip(folder / "000000.tar", 1)
    data = module(folder.parent, judge=["train"])
    with pytest.raises(Damaged, match="sample 1 of"):
        list(data.judge_batches("train", 4, data.groups))


def test_every_reason_has_a_word_of_its_own():
    assert max(Counter(reason.value for reason in Reason).values()) == 1
