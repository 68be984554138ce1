"""Tars without an index: the right samples, the same for all, little promised and nothing lost unseen."""

import io
import json
import logging
import tarfile
import tracemalloc
from dataclasses import replace
from itertools import islice, repeat

import open_clip
import pytest
import torch
import webdataset
from photos import PREPROCESS, jpeg, tokenizer
from servers import Server

from longclip import dist
from longclip.captions import Groups, Sentences, Whole
from longclip.curriculum import Curriculum
from longclip.data.faults import Damaged, Reason
from longclip.data.plans.plan import Plan
from longclip.data.streams import tape
from longclip.data.streams.stream import StreamModule
from longclip.data.streams.streaming import Tars
from longclip.data.streams.tape import Tape, samples
from longclip.data.tars import retry
from longclip.data.tars.storage import Storage
from longclip.tokens import unpack
from longclip.types import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", 0.001)


def text(number):
    return f"Photo {number}. It shows waves. I like {number}."


def write_tar(path, numbers):
    """As img2dataset writes: a jpg, a txt and a json with the caption and much besides."""
    with webdataset.TarWriter(str(path)) as tar:
        for number in numbers:
            described = {"caption": text(number), "more": {"alt": [f"Waves, {number}.", "The sea."]}}
            tar.write(
                {"__key__": f"{number:09d}", "jpg": jpeg(number), "txt": text(number), "json": described}
            )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tars").mkdir()
    for shard in range(4):
        write_tar(tmp_path / "tars" / f"{shard:05d}.tar", range(10 * shard, 10 * shard + 10))
    return tmp_path / "tars"


@pytest.fixture
def served(folder):
    with Server(folder) as server:
        yield server


def taken(options, names):
    return {name: options.pop(name) for name in list(options) if name in names}


def module(urls, **changes):
    plan = {"samples": 80, "batch_size": 8} | taken(changes, Plan.__annotations__)
    tars = {"captions": {"alt": "txt"}, "shuffle": 7} | taken(changes, ["captions"])
    groups = Groups({"long": Whole(), "sub": Sentences(2)}, seed=0)
    options = {"root": ".", "judge": [], "workers": 0, "max_faults": 1.0, "preprocess": PREPROCESS}
    options |= {"tars": Tars(urls, **tars), "plan": Plan(**plan), "groups": groups, "tokenizer": tokenizer()}
    return StreamModule(**options | changes)


def shown(batches):
    return [int(key) for batch in batches for key in batch.keys]


def test_the_samples_are_those_that_webdataset_finds(folder, served):
    theirs = list(webdataset.WebDataset(str(folder / "00002.tar"), shardshuffle=False))
    for url in (str(folder / "00002.tar"), f"{served.url}/00002.tar"):
        ours = list(samples(url, Storage()))
        assert [found.key for found in ours] == [sample["__key__"] for sample in theirs]
        assert all(
            found.members.items() <= sample.items() for found, sample in zip(ours, theirs, strict=True)
        )
    assert served.gets() == [None], "one request a tar"


def test_batches_are_those_of_the_contract(folder):
    batch = next(iter(module(str(folder)).train_dataloader()))
    assert batch.pixels_BCHW.shape == (8, 3, 16, 16)
    assert batch.pixels_BCHW.dtype == torch.uint8
    assert batch.lengths_BK.shape == (8, 3)
    ids_SL = unpack(batch.tokens_T, batch.lengths_BK.flatten(), 77)
    expected = open_clip.get_tokenizer("ViT-B-16")([text(int(key)) for key in batch.keys])
    assert torch.equal(ids_SL[::3], expected), "the ids of open_clip, made on line"


def test_every_sample_comes_once_a_pass_and_every_pass_is_another(folder):
    numbers = shown(module(str(folder), samples=88).train_dataloader())
    assert len(numbers) == 88
    assert set(numbers) == set(range(40))
    assert max(numbers.count(number) for number in range(40)) <= 3
    assert numbers[:40] != sorted(numbers[:40])
    assert numbers[:40] != numbers[40:80]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_arguments_give_the_same_batches(folder, served, workers):
    left, right = (
        list(module(urls, workers=workers).train_dataloader())
        for urls in (f"{folder}/{{00000..00003}}.tar", str(folder))
    )
    assert shown(left) == shown(right)
    assert all(torch.equal(a.tokens_T, b.tokens_T) for a, b in zip(left, right, strict=True))
    other = module(str(folder), workers=workers, seed=5)
    assert shown(other.train_dataloader()) != shown(left)
    there = module(f"{served.url}/{{00000..00003}}.tar", workers=workers).train_dataloader()
    assert len(list(there)) == len(there) == len(left) == 10


def test_a_resumed_run_has_the_steps_that_are_left_in_another_order(folder):
    whole, rest = module(str(folder)), module(str(folder))
    assert (whole.resume(0, 0), rest.resume(32, 4)) == (10, 6)
    loader = rest.train_dataloader()
    assert len(loader) == 10
    numbers = shown(loader)
    assert len(numbers) == 48
    assert numbers != shown(whole.train_dataloader())[32:]


def test_schedules_follow_the_position_before_and_after_a_resume(folder):
    seen = []

    class Spy(Whole):
        def __call__(self, captions, rng, progress=0.0):
            seen.append(progress)
            return super().__call__(captions, rng, progress)

    for position in (0, 32):
        data = module(str(folder), groups=Groups({"long": Spy()}, seed=0))
        data.resume(position, position // 8)
        list(data.train_dataloader())
    assert seen[:80] == pytest.approx([at // 8 / 10 for at in range(80)])
    assert seen[80:] == pytest.approx(seen[32:80])


def test_what_it_cannot_promise_is_said(folder, caplog):
    with caplog.at_level(logging.INFO, logger="longclip"):
        module(str(folder), workers=2).train_dataloader()
    for words in ("4 tars in 2 streams", "exactly once an epoch", "resume", "without an index"):
        assert words in caplog.text
    assert "4 tars do not divide evenly" in module(str(folder), workers=3).promises()


def test_the_surface_is_that_of_the_data_module(folder):
    data = module(str(folder), epoch=40, samples=100)
    assert "4 tars from front to back, the first one " in data.describe()
    assert data.epoch_size == data.report()[0].samples == 40
    assert data.report()[0].passes == 2.5
    assert data.shown(56) == {"stream": 56}
    assert json.dumps(data.signature()) == "{}"
    assert len(data.probe(12).keys) == 12
    data.prepare_data()
    data.setup("fit")


def test_captions_come_from_the_json_where_it_is_told(folder):
    data = module(str(folder), captions={"raw": "json.caption", "alt": "json.more.alt"})
    groups = Groups({"all": Whole(join=True)}, seed=0, shuffle=False)
    data.view = replace(data.view, groups=groups, tokenizer=tokenizer(), augment=None)
    batch = data.probe(4)
    ids_SL = unpack(batch.tokens_T, batch.lengths_BK.flatten(), 77)
    texts = [f"{text(int(key))} Waves, {int(key)}. The sea." for key in batch.keys]
    assert torch.equal(ids_SL, open_clip.get_tokenizer("ViT-B-16")(texts))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_stages_of_a_curriculum(folder, workers):
    stages = Curriculum(80, image_size=[(0, 8), (0.5, None)], context_length=[(0, 9), (0.5, None)])
    data = module(str(folder), curriculum=stages, workers=workers)
    found = list(data.train_dataloader())
    assert [batch.pixels_BCHW.shape[-1] for batch in found] == [8] * 5 + [16] * 5
    assert [batch.longest == 9 for batch in found] == [True] * 5 + [False] * 5
    assert all((batch.withheld > 0) == (place < 5) for place, batch in enumerate(found))
    assert data.probe(4).pixels_BCHW.shape[-1] == 16, "the first look is at whole images"
    data.resume(32, 4)
    assert [batch.pixels_BCHW.shape[-1] for batch in data.train_dataloader()] == [8] + [16] * 5


def add(tar, name, content, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
    tar.addfile(info, io.BytesIO(content))


def test_faults_of_single_samples_are_left_out_and_counted(folder):
    with tarfile.open(folder / "00004.tar", "w") as tar:
        for name, content in {
            "90.jpg": jpeg(0),
            "91.jpg": jpeg(1), "91.txt": b" ",
            "92.txt": b"No image.",
            "93.jpg": jpeg(3)[:-40], "93.txt": b"Broken.",
            "94.jpg": b"GIF89a", "94.txt": b"No photo.",
            "95.jpg": jpeg(5), "95.txt": b"\xff\xfe",
            "000000003.jpg": jpeg(3), "000000003.txt": b"Fine: another tar may have the key.",
            "96.jpg": jpeg(6), "96.txt": b"Fine.",
            "97.jpg": jpeg(7), "97.txt": b"Twice.",
        }.items():  # fmt: skip
            add(tar, name, content)
        add(tar, "97.jpg", jpeg(7))
        add(tar, "98.jpg", b"", tarfile.SYMTYPE)
        add(tar, "98.txt", b"A link is no image.")
        add(tar, "96.jpg", jpeg(6))
        add(tar, "._99.jpg", b"what a Mac leaves")
    data = module(str(folder / "00004.tar"), samples=40)
    batches = list(data.train_dataloader())
    assert set(shown(batches)) == {3, 96}
    data.ledger.judge()
    counts = {name.rpartition("/")[2]: n for name, n in data.ledger.measures().items()}
    passes = counts["twice"]
    assert counts["caption"] == pytest.approx(2 * passes, abs=4)
    assert counts["image"] == pytest.approx(2 * passes, abs=4)
    assert counts["json"] == pytest.approx(passes, abs=2)
    assert counts["member"] == pytest.approx(3 * passes, abs=6)


def test_a_json_of_another_shape_is_no_caption(folder):
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number, content in enumerate(
            (b"[]", b"{", b'{"caption": 5}', b"[" * 100_000, b'{"caption": "Fine."}')
        ):
            add(tar, f"{number}.jpg", jpeg(number))
            add(tar, f"{number}.json", content)
    batch = module(str(folder / "x.tar"), captions={"raw": "json.caption"}).probe(3)
    assert batch.keys == ["4", "4", "4"]
    assert [skip.reason for skip in batch.skips[:4]] == [
        Reason.CAPTION, Reason.JSON, Reason.CAPTION, Reason.JSON,
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "cut between members", "header", "zeros"])
def test_a_damaged_tar_is_never_taken_for_a_short_one(folder, damage):
    tar = folder / "00001.tar"
    with tarfile.open(tar) as opened:
        middle = opened.getmembers()[16].offset
    content = bytearray(tar.read_bytes())
    if damage == "cut":
        content = content[: middle + 700]
    elif damage == "cut between members":
        content = content[:middle]
    elif damage == "header":
        content[middle + 20] ^= 4
    else:
        content[middle : middle + 512] = bytes(512)
    tar.write_bytes(content)
    found = list(samples(str(tar), Storage()))
    assert [isinstance(item, Damaged) for item in found] == [False] * (len(found) - 1) + [True]
    assert 4 <= len(found) - 1 <= 6
    assert found[-1].reason is Reason.CUT
    assert "00001.tar is cut or broken behind 5 samples" in str(found[-1])
    assert len(shown(module(str(folder)).train_dataloader())) == 80, "the other tars are read"


@pytest.mark.parametrize("whole", [False, True])
def test_a_broken_connection_is_taken_up_where_it_broke(folder, served, whole, monkeypatch):
    monkeypatch.setattr(tape, "CHUNK", 512)
    served.answer("00000.tar", [503, "cut", "whole"] if whole else [503, "cut", "cut", "cut"])
    ours = [found.key for found in samples(f"{served.url}/00000.tar", Storage())]
    assert ours == [f"{number:09d}" for number in range(10)]
    asked = served.gets()
    assert asked[:2] == [None, None]
    # A cut can overtake the bytes before it, but not three times; a server may send the whole all the same.
    assert whole or any(asked[2:])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (repeat(404), r"00001\.tar does not exist"),
        (repeat(503), r"00001\.tar cannot be read: status 503"),
        (repeat("slow"), r"00001\.tar cannot be read: no answer in time"),
        (repeat("cut"), r"00001\.tar cannot be read: "),
    ],
)
def test_a_tar_that_cannot_be_had_ends_the_run(served, answers, message):
    served.answer("00001.tar", answers)
    data = module(f"{served.url}/{{00000..00003}}.tar", storage=Storage(retries=1, deadline=3.0))
    with pytest.raises(UserError, match=message) as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


def test_it_ends_from_a_worker_too(served):
    served.answer("00001.tar", repeat(404))
    with pytest.raises(UserError, match=r"^http.*00001\.tar does not exist; [^\n]*$"):
        list(module(f"{served.url}/{{00000..00003}}.tar", workers=1).train_dataloader())


def test_tars_without_a_sample_end_the_run(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        add(tar, "folder/", b"", tarfile.DIRTYPE)
    with pytest.raises(UserError, match=r"tar after tar holds no sample, such as .*empty\.tar"):
        module(str(tmp_path)).probe(1)
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        add(tar, "1.txt", b"no image")
    with pytest.raises(
        UserError, match="samples were no good for a batch of 1; the last one: sample '1': no image"
    ):
        module(str(tmp_path)).probe(1)


def test_programs_and_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="pipe: address, which runs a program"):
        module(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="names no tar"):
        module(str(tmp_path))


def test_a_local_tar_that_is_absent_is_named(folder):
    with pytest.raises(UserError, match=r"00007\.tar does not exist"):
        list(module(f"{folder}/{{00000,00007}}.tar").train_dataloader())


def test_too_few_tars_and_odd_batches_are_named(folder):
    with pytest.raises(UserError, match=r"4 tars cannot feed 1 processes x 5 workers.*set data\.workers=4"):
        module(str(folder), workers=5).train_dataloader()
    with pytest.raises(UserError, match="cannot compose batches"):
        module(str(folder), batches="similar")


def test_processes_have_equally_many_batches_whatever_their_tars_hold(folder, monkeypatch):
    write_tar(folder / "00004.tar", range(900, 903))
    monkeypatch.setattr(dist, "world", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        ranks.append(shown(module(str(folder)).train_dataloader()))
    assert len(ranks[0]) == len(ranks[1]) == 40
    assert set(ranks[0][:10]).isdisjoint(ranks[1][:10])
    with pytest.raises(UserError, match="must be a multiple of their number, 2"):
        module(str(folder), batch_size=9).train_dataloader()


def test_memory_does_not_grow_with_time(folder):
    stream = iter(module(str(folder), samples=100_000).train_dataloader())
    for _ in islice(stream, 10):
        pass
    tracemalloc.start()
    first = tracemalloc.get_traced_memory()[0]
    for _ in islice(stream, 30):
        pass
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 200_000, "30 batches of 8 photos and their headers"


def test_a_tape_reads_what_the_file_holds(folder, served):
    content = (folder / "00000.tar").read_bytes()
    for url in (str(folder / "00000.tar"), f"{served.url}/00000.tar"):
        reading = Tape(url, Storage())
        parts = list(iter(lambda reading=reading: reading.read(5000), b""))
        reading.close()
        assert b"".join(parts) == content
