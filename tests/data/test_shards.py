"""Shards: whole or an error, deterministic, and readable by stock tools."""

import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import simplejpeg
import webdataset

from longclip.captions import parse
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.index import digests, parse_list, read_index
from longclip.data.tars.keys import Keys
from longclip.data.tars.shards import Writer, write
from longclip.tokens import Tokenizer
from longclip.types import NO_IDS, Box, Caption, Record, Sentence, UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


def jpeg(seed: int) -> bytes:
    pixels_HWC = np.random.RandomState(seed).randint(0, 255, (16, 16, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels_HWC)


def record(number: int, tokenizer: Tokenizer, **changes: object) -> Record:
    long = parse(f"A café with {number} chairs. They are red!", "human", tokenizer)
    boxed = [s._replace(box=(0.0, 0.25, 0.5, 1 / 3) if i else None) for i, s in enumerate(long.sentences)]
    captions = (long._replace(sentences=tuple(boxed)), parse(f"Chairs, {number}.", "alt", tokenizer))
    plain = Record(f"k{number:03d}", jpeg(number), "jpg", captions, {"group": number, "name": "ü"})
    return plain._replace(**changes)


@pytest.fixture(scope="module")
def records(tokenizer: Tokenizer) -> list[Record]:
    return [record(number, tokenizer) for number in range(7)]


@pytest.fixture
def folder(tmp_path: Path, records: list[Record], tokenizer: Tokenizer) -> Path:
    write(records, tmp_path / "train", samples_per_shard=3, tokenizer_hash=tokenizer.name_hash)
    return tmp_path / "train"


def test_what_is_written_is_read(folder: Path, records: list[Record], tokenizer: Tokenizer) -> None:
    for data in (Dataset(folder, tokenizer), Dataset(folder)):
        assert [data.record(index) for index in range(len(data))] == records
    assert list(Dataset(folder).keys()) == [r.key for r in records]
    assert [path.name for path in sorted(folder.iterdir())] == [
        *(f"{n:06d}.{end}" for n in range(3) for end in ("index.json", "tar")),
        "shards.json",
    ]


def test_keys_beyond_ascii_are_read_by_everybody(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from shards whose names stand in extended headers, as tar programs write them."""
    keys = ["Straße", "写真_1", "plain", "ü" * 45]
    records = [record(number, tokenizer, key=key) for number, key in enumerate(keys)]
    write(records, tmp_path / "train", samples_per_shard=9)
    stock = webdataset.WebDataset(str(tmp_path / "train" / "000000.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in stock] == keys
    monkeypatch.setattr(shards, "tarfile", SimpleNamespace(USTAR_FORMAT=tarfile.PAX_FORMAT))
    write(records, tmp_path / "extended", samples_per_shard=9)
    assert (tmp_path / "extended" / "000000.tar").read_bytes().count(b"path=") > 0
    for folder in ("train", "extended"):
        data = Dataset(tmp_path / folder, tokenizer)
        assert [data.record(index) for index in range(len(keys))] == records


def test_report_and_index_count_what_was_written(
    tmp_path: Path, records: list[Record], tokenizer: Tokenizer
) -> None:
    report = write(records, tmp_path, samples_per_shard=3, tokenizer_hash=tokenizer.name_hash)
    tars = sorted(tmp_path.glob("*.tar"))
    assert report == (7, 3, 14, sum(path.stat().st_size for path in tars))
    index = read_index(tars[2])
    assert (index.samples, index.captions, index.keys) == (1, 2, ["k006"])


def test_same_records_give_the_same_bytes(
    tmp_path: Path, records: list[Record], tokenizer: Tokenizer
) -> None:
    for name in "ab":
        write(records, tmp_path / name, samples_per_shard=3, tokenizer_hash=tokenizer.name_hash)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_stock_webdataset_reads_the_shards(folder: Path, records: list[Record]) -> None:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    seen = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb"))
    assert [sample["__key__"] for sample in seen] == [r.key for r in records]
    assert [sample["txt"] for sample in seen] == [r.captions[0].text for r in records]
    assert seen[0]["jpg"].size == (16, 16)
    assert seen[0]["json"]["captions"][1]["source"] == "alt"
    ids = np.frombuffer(seen[0]["ids"], "<u2")
    assert ids.tolist() == [i for c in records[0].captions for s in c.sentences for i in s.ids]


def test_stock_tarfile_finds_plain_files_only(folder: Path) -> None:
    with tarfile.open(folder / "000000.tar") as tar:
        assert all(m.isreg() and m.mtime == 0 and m.mode == 0o644 for m in tar.getmembers())


def test_other_tokenizer_in_the_index_gives_the_same_ids(
    tmp_path: Path, records: list[Record], tokenizer: Tokenizer
) -> None:
    wrong = [
        r._replace(
            captions=tuple(
                c._replace(sentences=tuple(s._replace(ids=(1, 2)) for s in c.sentences)) for c in r.captions
            )
        )
        for r in records
    ]
    write(wrong, tmp_path, tokenizer_hash="another")
    data = Dataset(tmp_path, tokenizer)
    assert [data.record(index) for index in range(7)] == records


def test_untokenised_shards_give_the_same_ids(
    tmp_path: Path, records: list[Record], tokenizer: Tokenizer
) -> None:
    write(records, tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert not [name for name in tar.getnames() if name.endswith(".ids")]
    assert [Dataset(tmp_path, tokenizer).record(index) for index in range(7)] == records
    assert Dataset(tmp_path).record(0).captions[0].sentences[0].ids == NO_IDS


def test_ids_beyond_sixteen_bits_are_not_stored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "A dog."
    big = Record("k", jpeg(0), "jpg", (Caption("x", text, (Sentence(0, 6, array("I", [70_000])),)),))
    write([big], tmp_path, tokenizer_hash=tokenizer.name_hash)
    assert Dataset(tmp_path, tokenizer).record(0).captions[0].sentences[0].ids == tokenizer.ids(text)


def test_a_copy_of_the_dataset_in_another_process_reads_on(folder: Path, records: list[Record]) -> None:
    data = Dataset(folder)
    assert data.record(0) == records[0]
    assert pickle.loads(pickle.dumps(data)).record(0) == records[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if [data.record(index) for index in range(7)] == records else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_stay_open(folder: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longclip.data.tars.dataset.OPEN_FILES", 1)
    data = Dataset(folder)
    before = len(os.listdir("/proc/self/fd"))
    assert [data.record(index) for index in (0, 6, 3, 0)] == [records[index] for index in (0, 6, 3, 0)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _cut(folder / "000001.tar"), r"000001.tar has \d+ bytes, its index says"),
        (lambda folder: (folder / "000001.index.json").unlink(), "index.json is missing"),
        (lambda folder: (folder / "000002.tar").unlink(), "000002.tar is missing"),
        (lambda folder: (folder / "000000.index.json").write_text("{"), "is no index of a shard"),
        (lambda folder: (folder / "UNFINISHED").touch(), "is UNFINISHED"),
        (lambda folder: shutil.rmtree(folder), "is no folder of shards .*longclip shards SRC"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no shards"),
    ],
)
def test_torn_or_missing_shards_are_an_error(folder: Path, damage: object, message: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        Dataset(folder)


def test_folder_of_splits_says_which_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"it has splits, so name one: .*/train"):
        Dataset(folder.parent)


def test_damaged_sample_names_its_shard_and_place(folder: Path) -> None:
    raw = bytearray((folder / "000001.tar").read_bytes())
    start = read_index(folder / "000001.tar").offsets[2]
    raw[start : start + 512] = bytes(512)
    (folder / "000001.tar").write_bytes(raw)
    data = Dataset(folder)
    assert data.record(4).key == "k004"
    with pytest.raises(UserError, match=r"sample 2 of .*000001.tar is damaged"):
        data.record(5)


def test_members_of_unknown_kind_are_never_opened(tmp_path: Path, records: list[Record]) -> None:
    write(records[:1], tmp_path)
    tar, index = tmp_path / "000000.tar", tmp_path / "000000.index.json"
    with tarfile.open(tar) as old, tarfile.open(tmp_path / "new", "w", format=tarfile.USTAR_FORMAT) as new:
        for name in old.getnames():
            member = old.extractfile(name)
            assert member is not None
            new.addfile(old.getmember(name), member)
        evil = tarfile.TarInfo("k000.pyd")
        evil.size = 20
        new.addfile(evil, io.BytesIO(b"cos\nsystem\n(S'x'\ntR."))
        end = new.offset
    os.replace(tmp_path / "new", tar)
    described = json.loads(index.read_text())
    sha256, crcs, size = digests(tar, [end])
    changes = {"sizes": [end], "crcs": crcs, "bytes": size, "sha256": sha256}
    index.write_text(json.dumps(described | changes))
    (tmp_path / "shards.json").unlink()
    assert Dataset(tmp_path).record(0).key == "k000"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "without dots or slashes"),
        ({"key": "../a"}, "without dots or slashes"),
        ({"key": ""}, "cannot name members"),
        ({"key": "x" * 91}, "1 to 90 bytes"),
        ({"key": "k000"}, "'k000' comes twice"),
        ({"extension": "gif"}, "shards hold jpg, png, webp"),
        ({"captions": ()}, "has no caption"),
    ],
)
def test_record_that_tools_cannot_read_is_refused(
    tmp_path: Path, records: list[Record], tokenizer: Tokenizer, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write([records[0], record(1, tokenizer, **change)], tmp_path)
    with pytest.raises(UserError, match="UNFINISHED"):
        Dataset(tmp_path)


@pytest.mark.parametrize("box", [(10, 20, 50, 90), (0.5, 0.1, 0.2, 0.9), (0, 0, 1, float("nan")), (0, 0, 1)])
def test_a_box_that_is_no_fractions_is_refused(tmp_path: Path, tokenizer: Tokenizer, box: Box) -> None:
    caption = parse("A cat. A dog.", "human", tokenizer, boxes=[(0, 0, 1, 1), box])
    with pytest.raises(UserError, match=r"'k001' has the box .* for 'A dog.'; .* divide pixels by its width"):
        write([record(1, tokenizer, captions=(caption,))], tmp_path)


def test_zero_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples came for"):
        write([], tmp_path)


def test_interrupted_writing_starts_afresh_and_finished_shards_are_kept(
    tmp_path: Path, records: list[Record]
) -> None:
    def stream() -> Iterator[Record]:
        yield from records[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stream(), tmp_path, samples_per_shard=2)
    assert (tmp_path / "000001.index.json").exists()
    write(records[:1], tmp_path)
    assert len(Dataset(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000000.index.json",
        "000000.tar",
        "shards.json",
    ]
    with pytest.raises(UserError, match="already holds finished shards"):
        write(records, tmp_path)
    assert len(Dataset(tmp_path)) == 1


def test_the_index_tells_the_longest_caption_of_each_sample(
    tmp_path: Path, folder: Path, records: list[Record]
) -> None:
    expected = [max(2 + sum(len(s.ids) for s in c.sentences) for c in r.captions) for r in records]
    tars = sorted(folder.glob("*.tar"))
    assert [length for tar in tars for length in read_index(tar).lengths] == expected
    write(records, tmp_path / "bare")
    assert read_index(tmp_path / "bare" / "000000.tar").lengths == [0] * 7


def test_the_list_of_shards_agrees_with_their_indexes(folder: Path) -> None:
    listed = parse_list((folder / "shards.json").read_bytes(), "shards.json")
    indexes = [read_index(folder / shard.name) for shard in listed]
    assert [shard.name for shard in listed] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [shard[1:] for shard in listed] == [(i.samples, i.captions, i.bytes, i.sha256) for i in indexes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has version 3, this longclip reads 1"),
        ({"samples": 6}, "samples do not add up"),
        ({"shards": 5}, "is no list of shards"),
        ({"shards": [{"name": "x"}]}, "is no list of shards"),
        (
            {"shards": [{"name": "../0.tar", "samples": 7, "captions": 1, "bytes": 1, "sha256": ""}]},
            "NNNNNN.tar",
        ),
    ],
)
def test_a_wrong_list_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    described = json.loads((folder / "shards.json").read_text())
    with pytest.raises(UserError, match=message):
        parse_list(json.dumps(described | change).encode(), "shards.json")
    with pytest.raises(UserError, match="is no list of shards"):
        parse_list(b"[" * 100_000, "shards.json")


def _interrupted(records: list[Record]) -> Iterator[Record]:
    yield from records
    raise KeyboardInterrupt


def test_a_writer_goes_on_behind_the_shards_that_it_keeps(
    tmp_path: Path, folder: Path, records: list[Record], tokenizer: Tokenizer
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(_interrupted(records[:5]), tmp_path, 3, tokenizer.name_hash)
    with Writer(tmp_path, 3, tokenizer.name_hash, kept=1) as writer:
        with pytest.raises(UserError, match="comes twice"):
            writer.add(records[0])
        for found in records[3:]:
            writer.add(found)
    assert writer.report[:3] == (7, 3, 14)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_torn_shard_is_not_kept(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(_interrupted(records[:5]), tmp_path, 3)
    _cut(tmp_path / "000000.tar")
    with pytest.raises(UserError, match="its index says"):
        Writer(tmp_path, 3, kept=1)


def test_keys_are_exact_and_on_disk(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    tracemalloc.start()
    assert all(keys.add(f"key {number}") for number in range(50_000))
    assert tracemalloc.get_traced_memory()[1] < 100_000, "bytes of Python objects"
    tracemalloc.stop()
    assert not keys.add("key 7")
    assert ("key 49999" in keys, "key 50000" in keys, "KEY 7" in keys) == (True, False, False)
    keys.close()
    assert list(tmp_path.iterdir()) == []
