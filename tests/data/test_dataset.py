"""Shards behind a URL: the same records and batches as on the disk, for few requests."""

import json
import logging
import shutil
from itertools import repeat

import fsspec
import pytest
import torch
from photos import make, module, record, records, tokenizer
from servers import Server

from longclip.data.tars import retry, storage
from longclip.data.tars.cache import open_cache
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.storage import Storage
from longclip.types import UserError

COUNT = 21


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    open_cache.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make(folder / "train", list(records(COUNT)))
    return folder


@pytest.fixture
def served(made, tmp_path):
    shutil.copytree(made, tmp_path / "served")
    with Server(tmp_path / "served") as server:
        yield server


def all_records(data):
    return [data.record(index) for index in range(len(data))]


def equal(ours, theirs):
    return all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def test_http_gives_the_records_of_the_disk(made, served):
    there, here = Dataset(f"{served.url}/train", tokenizer()), Dataset(made / "train", tokenizer())
    assert all_records(there) == all_records(here) == list(records(COUNT))
    assert list(there.keys()) == [f"k{number}" for number in range(COUNT)]
    assert there.lengths.tolist() == here.lengths.tolist()
    assert there.lengths[0] == 2 + sum(len(s.ids) for s in record(0).captions[0].sentences)
    assert there.shard(COUNT - 1) == f"{served.url}/train/000002.tar"


def test_any_file_system_of_fsspec_will_do(made):
    memory = fsspec.filesystem("memory")
    memory.put(str(made / "train"), "/bucket/train", recursive=True)
    assert all_records(Dataset("memory://bucket/train")) == all_records(Dataset(made / "train"))


def test_the_start_reads_indexes_and_no_samples(served):
    Dataset(f"{served.url}/train")
    assert not served.gets(".tar")
    assert len(served.gets(".index.json")) == 3
    assert len(served.gets("shards.json")) == 1


def test_a_sample_costs_one_request_and_with_a_cache_a_block_does(made, served, tmp_path, monkeypatch):
    plain = Dataset(f"{served.url}/train")
    assert all_records(plain) == list(records(COUNT))
    assert len(served.gets(".tar")) == COUNT
    monkeypatch.setattr(storage, "BLOCK", 8192)
    kept = Dataset(f"{served.url}/train", storage=Storage(cache=str(tmp_path / "cache")))
    served.asked.clear()
    assert all_records(kept) == all_records(kept) == list(records(COUNT))
    blocks = sum(-(-path.stat().st_size // 8192) for path in (made / "train").glob("*.tar"))
    assert len(served.gets(".tar")) <= blocks < COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_http_shows_what_a_run_from_the_disk_shows(made, served, tmp_path, workers):
    here = list(module(made).train_dataloader())
    kept = Storage(cache=str(tmp_path / "cache"))
    there = list(module(served.url, storage=kept, workers=workers).train_dataloader())
    assert len(here) == len(there) == 10
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert len(served.gets(".tar")) == 3, "every block once, whatever the number of workers"


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 6), (2, 6), (1, 3)])
def test_a_remote_run_resumes_in_the_middle_of_an_epoch(made, served, workers, batch_size):
    whole = torch.cat([batch.pixels_BCHW for batch in module(made).train_dataloader()])
    rest = module(served.url, workers=workers, batch_size=batch_size)
    assert rest.resume(24, 4) == 36 // batch_size
    batches = list(rest.train_dataloader())
    assert torch.equal(torch.cat([batch.pixels_BCHW for batch in batches]), whole[24:])


def test_passing_faults_change_no_batch(made, served):
    for ending, answers in {
        "000000.tar": [503, None, "cut", None, 429],
        "000001.tar": ["cut", "cut"],
        "shards.json": [500],
        "000002.index.json": ["cut", 503],
    }.items():
        served.answer(ending, answers)
    here, there = (list(module(root).train_dataloader()) for root in (made, served.url))
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_broken_block_in_the_cache_is_read_again(made, served, tmp_path):
    data = Dataset(f"{served.url}/train", storage=Storage(cache=str(tmp_path / "cache")))
    data.record(0)
    (block,) = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    block.write_bytes(bytes(len(block.read_bytes())))
    assert data.record(1) == record(1)


def test_an_uncached_run_says_so_once(served, caplog):
    with caplog.at_level(logging.INFO):
        Dataset(f"{served.url}/train")
    assert "one request a sample; data.storage.cache=FOLDER" in caplog.text


def test_a_local_folder_without_a_list_is_listed(made, tmp_path):
    shutil.copytree(made / "train", tmp_path / "train")
    (tmp_path / "train" / "shards.json").unlink()
    assert all_records(Dataset(tmp_path / "train")) == list(records(COUNT))


@pytest.mark.parametrize(
    ("ending", "answers", "message"),
    [
        ("000001.tar", repeat(404), r"lists 000001\.tar, but .*000001\.tar does not exist"),
        ("000001.index.json", repeat(404), r"lists 000001\.tar, but .*index\.json does not exist"),
        ("shards.json", repeat(404), "is no folder of finished shards .*data=stream"),
        ("000002.tar", repeat(503), r"000002\.tar cannot be read: status 503"),
        ("000002.index.json", repeat("slow"), r"index\.json cannot be read: no answer in time"),
        ("shards.json", repeat(403), r"shards\.json is refused \(status 403\)"),
    ],
)
def test_what_cannot_be_had_is_named_at_the_start(served, ending, answers, message):
    served.answer(ending, answers)
    with pytest.raises(UserError, match=message) as caught:
        Dataset(f"{served.url}/train", storage=Storage(retries=1, deadline=0.5))
    assert "\n" not in str(caught.value)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "000001.tar").write_bytes(b"x" * 999), r"000001\.tar has 999 bytes, .* says"),
        (lambda d: shutil.copy(d / "000002.index.json", d / "000001.index.json"), r"000001\.(tar|index)"),
        (lambda d: change(d / "000001.index.json", sha256="0" * 64), "of another tar"),
        (lambda d: change(d / "000001.index.json", samples=7), "is no index of a shard"),
        (lambda d: change(d / "000001.index.json", keys=["k8"] * 8), "a key comes twice"),
        (lambda d: change(d / "000001.index.json", version=1), "version 1, this longclip reads"),
        (lambda d: (d / "000001.index.json").write_text("[" * 100_000), "is no index"),
        (lambda d: change(d / "shards.json", shards=[{"name": "../evil.tar"}]), "is no list of shards"),
        (lambda d: change(d / "shards.json", samples=3), "do not add up"),
    ],
)
def test_an_index_that_does_not_match_its_shard_is_refused(served, damage, message, local):
    damage(served.folder / "train")
    with pytest.raises(UserError, match=message) as caught:
        Dataset(served.folder / "train" if local else f"{served.url}/train")
    assert "\n" not in str(caught.value)


def test_a_shard_that_goes_away_while_reading_is_named(made, served):
    data = Dataset(f"{served.url}/train")
    (served.folder / "train" / "000001.tar").unlink()
    assert data.record(0) == record(0)
    with pytest.raises(UserError, match=r"000001\.tar does not exist"):
        data.record(9)


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs 'moto[server]'")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install s3fs 'moto[server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield "s3://bucket"
    server.stop()


def test_s3_gives_the_batches_of_the_disk(made, bucket, tmp_path):
    fsspec.filesystem("s3").put(str(made / "train"), f"{bucket}/train", recursive=True)
    here = list(module(made).train_dataloader())
    kept = Storage(cache=str(tmp_path / "cache"))
    there = list(module(bucket, workers=1, storage=kept).train_dataloader())
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert not Storage().exists(f"{bucket}/train/000009.tar")
    with pytest.raises(UserError, match="s3://bucket/dev is no folder of finished shards"):
        Dataset(f"{bucket}/dev")
