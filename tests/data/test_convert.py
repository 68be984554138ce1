"""Conversion: deterministic, complete, resumable, and whatever is left out is named."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import open_clip
import pytest
import webdataset
from sources import IMAGES, KEPT, TEXTS, encoded, save_images, save_lines, save_tar
from sources import webdataset as save_webdataset

from longclip import cli
from longclip.data.converting.convert import ConversionReport, Step, convert
from longclip.data.converting.layouts import Source, load
from longclip.data.converting.prepare import LONGEST_CAPTION, Prepare, absurd
from longclip.data.converting.progress import Lines
from longclip.data.converting.survey import describe, survey
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.index import read_index
from longclip.tokens import Tokenizer
from longclip.types import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 248)


def long_text(number: int) -> str:
    return f"A dog {' '.join(chr(97 + place % 26) * (1 + place // 26) for place in range(10 * number))}."


def source(folder: Path, extra: list[dict[str, object]] | None = None, good: int = 9) -> Path:
    """Good entries, every third in the split dev, then whatever a test adds."""
    images = folder / "images"
    images.mkdir(parents=True)
    entries: list[dict[str, object]] = []
    for number in range(good):
        (images / f"{number}.jpg").write_bytes(IMAGES[[0, 7, 6][number % 3]])
        captions = [
            f"Photo {number}. It shows a dog, e.g. a poodle.",
            long_text(number % 9),
        ]
        split = "dev" if number % 3 == 2 else "train"
        entries.append({"image": f"images/{number}.jpg", "captions": captions, "split": split})
    (images / "half.jpg").write_bytes(IMAGES[4])
    (images / "page.jpg").write_bytes(b"<html>not found</html>")
    (images / "empty.png").write_bytes(b"")
    (images / "rgba.jpg").write_bytes(IMAGES[5])  # a PNG by another name
    save_lines(folder / "captions.jsonl", [*entries, *(extra or [])])
    return folder


BAD: list[dict[str, object]] = [
    {"image": "images/half.jpg", "captions": ["x y"]},
    {"image": "images/page.jpg", "captions": ["x y"]},
    {"image": "images/empty.png", "captions": ["x y"]},
    {"image": "images/gone.jpg", "captions": ["x y"]},
    {"image": "images/0.jpg", "captions": ["x y"]},
    {"image": "images/rgba.jpg", "captions": ["x y", "  "]},
    {"image": "images/rgba.jpg", "captions": [], "key": "none"},
    {"image": "images/rgba.jpg", "captions": "x y"},
]


def run(folder: Path, out: Path, tokenizer: Tokenizer, **options: object) -> ConversionReport:
    options = {"samples_per_shard": 4, **options}
    return convert(Source(folder, load("jsonl")), out, tokenizer=tokenizer, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_good_entry_arrives_in_its_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = run(source(tmp_path / "in"), tmp_path / "out", tokenizer)
    assert {split: done[:3] for split, done in report.splits.items()} == {
        "train": (6, 2, 12),
        "dev": (3, 1, 6),
    }
    train = Dataset(tmp_path / "out" / "train", tokenizer)
    assert list(train.keys()) == ["0", "1", "3", "4", "6", "7"]
    caption = train.record(1).captions[0]
    assert [caption.text[s.start : s.end] for s in caption.sentences] == [
        "Photo 1.",
        "It shows a dog, e.g. a poodle.",
    ]
    assert train.record(1).meta == {"image": "images/1.jpg"}


def test_lengths_count_start_and_end_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = run(source(tmp_path / "in"), tmp_path / "out", tokenizer)
    expected = [2 + len(tokenizer.ids(long_text(n))) for n in range(9)]
    assert sum(report.lengths.values()) == 18
    assert max(report.lengths) == max(expected)
    assert report.share_over(77) == sum(length > 77 for length in expected) / 18
    assert f"{report.share_over(77):.1%} over 77 tokens, 0.0% over 248 tokens" in str(report)
    assert 0 < report.share_over(77) < 0.5
    index = read_index(tmp_path / "out" / "dev" / "000000.tar")
    assert index.lengths == [expected[n] for n in (2, 5, 8)]


def test_the_eight_samples_arrive_in_stock_webdataset(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [text if isinstance(text, list) else text and [text] for text in TEXTS]
    rows: list[dict[str, object]] = [{"caption": text} for text in lines]
    save_webdataset(tmp_path / "0.tar", rows)
    report = convert(
        Source(tmp_path / "0.tar", load("img2dataset")), tmp_path / "out", tokenizer=tokenizer, max_faults=0.5
    )
    assert report.faults == {"no captions": 1, "image is truncated": 1}
    assert report.notes == {f"image is {mode}, read as RGB": 1 for mode in ("P", "RGBA", "CMYK", "L")}
    shards = [str(path) for path in sorted((tmp_path / "out" / "train").glob("*.tar"))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb"))
    assert [sample["__key__"] for sample in read] == [f"00000000{n}" for n in KEPT]
    assert [next(kind for kind in ("jpg", "png", "webp") if kind in s) for s in read] == [
        *["jpg", "webp", "png", "png", "jpg", "jpg"]
    ]
    assert read[2]["txt"] == "A car. It is red. Its door is open."
    assert read[-1]["txt"] == TEXTS[7]
    record = Dataset(tmp_path / "out" / "train").record(2)
    assert [record.captions[0].text[s.start : s.end] for s in record.captions[0].sentences] == [
        "A car.",
        "It is red.",
        "Its door is open.",
    ]


def test_every_fault_is_counted_and_listed_with_its_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    seen: list[Step] = []
    report = run(
        source(tmp_path / "in", BAD), tmp_path / "out", tokenizer, max_faults=0.5, progress=seen.append
    )
    assert report.faults == {
        "image is truncated": 1,
        "image is no JPEG, PNG or WebP": 1,
        "image is empty": 1,
        "image is missing": 1,
        "key comes twice": 1,
        "caption is empty": 1,
        "no captions": 1,
        "captions are no list of texts": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [(item["key"], item["reason"], item["lost"]) for item in listed][::5] == [
        ("half", "image is truncated", "entry"),
        ("rgba", "caption is empty", "caption"),
    ]
    assert listed[0]["where"] == "captions.jsonl:10"
    assert len(listed) == 8
    assert [step.left_out for step in seen] == [0] * 9 + [1, 2, 3, 4, 5, 5, 6, 7]
    assert seen[-1] == Step(1.0, 10, 7)


def test_extension_follows_the_bytes_not_the_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = source(tmp_path / "in", [{"image": "images/rgba.jpg", "captions": ["A gradient."]}])
    run(folder, tmp_path / "out", tokenizer)
    last = Dataset(tmp_path / "out" / "train", tokenizer).record(6)
    assert (last.key, last.extension) == ("rgba", "png")


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = source(tmp_path / "in", BAD, good=40)
    for workers in (1, 3):
        run(folder, tmp_path / str(workers), tokenizer, workers=workers, max_faults=0.5)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) == 2 * (7 + 4) + 3


def test_a_key_that_comes_twice_names_both_images(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also where the first one is in a shard that an interrupted conversion has finished."""
    (tmp_path / "in").mkdir()
    names = ["a b.jpg", *(f"{n}.jpg" for n in range(9)), "a_b.jpg"]
    for name in names:
        (tmp_path / "in" / name).write_bytes(IMAGES[0])
    save_lines(tmp_path / "in" / "captions.jsonl", [{"image": name, "captions": ["x y"]} for name in names])

    def stop(step: Step) -> None:
        if step.images == 9:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "in", tmp_path / "out", tokenizer, progress=stop)
    assert run(tmp_path / "in", tmp_path / "out", tokenizer, max_faults=0.5).faults == {"key comes twice": 1}
    detail = json.loads((tmp_path / "out" / "errors.jsonl").read_text())["detail"]
    assert detail.startswith(
        "a b.jpg (captions.jsonl:1) and a_b.jpg (captions.jsonl:11) have one key: rename"
    )
    assert not list((tmp_path / "out").glob("*.partial"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 7, 8, 20, 43, 48])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, at: int
) -> None:
    folder = source(tmp_path / "in", BAD, good=40)
    whole = run(folder, tmp_path / "whole", tokenizer, max_faults=0.5)
    steps: list[Step] = []

    def stop(step: Step) -> None:
        steps.append(step)
        if len(steps) == at:
            raise Killed

    with pytest.raises(Killed):
        run(folder, tmp_path / "out", tokenizer, max_faults=0.5, progress=stop)
    with pytest.raises(UserError, match="UNFINISHED"):
        Dataset(tmp_path / "out" / "train")
    kept = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.tar")}
    report = run(folder, tmp_path / "out", tokenizer, max_faults=0.5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report == whole
    assert all(path.stat().st_ino == inode for path, inode in kept.items()), "finished shards are kept"


class Watched:
    """A tokenizer that leaves a file named as its process, and kills that when it meets a text."""

    def __init__(self, inner: Tokenizer, folder: Path, deadly: str = "") -> None:
        self.inner, self.folder, self.deadly = inner, folder, deadly
        self.prefix, self.suffix, self.name_hash = inner.prefix, inner.suffix, inner.name_hash
        folder.mkdir()

    def ids(self, text: str) -> tuple[int, ...]:
        (self.folder / str(os.getpid())).touch()
        if text == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.ids(text)

    def alive(self) -> list[str]:
        """Processes that have worked and are still there."""
        states = [Path("/proc") / path.name / "stat" for path in self.folder.iterdir()]
        return [
            s.parent.name for s in states if s.exists() and s.read_text().rpartition(")")[2].split()[0] != "Z"
        ]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def test_a_conversion_killed_with_sigkill_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = source(tmp_path / "in", BAD, good=300)
    watched = Watched(tokenizer, tmp_path / "processes")
    forkserver.set_forkserver_preload(["longclip.data.converting.prepare"])
    forkserver.ensure_running()
    child = os.fork()
    if child == 0:
        try:
            forkserver._forkserver.ensure_running = lambda: None  # the parent's serves its child as well
            run(folder, tmp_path / "out", watched, max_faults=0.5, workers=2)  # type: ignore[arg-type]
        finally:
            os._exit(1)
    wait_until(lambda: list((tmp_path / "out").rglob("000003.index.json")))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was still at work"
    kept = {path: path.stat().st_ino for path in (tmp_path / "out" / "train").glob("00000[012].tar")}
    run(folder, tmp_path / "out", tokenizer, max_faults=0.5)
    run(folder, tmp_path / "whole", tokenizer, max_faults=0.5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(path.stat().st_ino == inode for path, inode in kept.items()), "finished shards are kept"
    wait_until(lambda: not watched.alive())  # workers end with their main process


def test_a_worker_that_is_killed_is_said_and_finished_shards_are_kept(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = source(tmp_path / "in", good=40)
    deadly = Watched(tokenizer, tmp_path / "processes", deadly="Photo 30.")
    with pytest.raises(
        UserError, match=r"one of the 2 workers was killed.* --workers 1: finished shards are kept"
    ):
        run(folder, tmp_path / "out", deadly, workers=2)  # type: ignore[arg-type]
    run(folder, tmp_path / "out", tokenizer)
    run(folder, tmp_path / "whole", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "name"),
    [({"samples_per_shard": 3}, "--samples-per-shard"), ({"splitter": "dreamlip"}, "--splitter")],
)
def test_an_interrupted_conversion_goes_on_only_with_the_same_arguments(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, object], name: str
) -> None:
    folder = source(tmp_path / "in", [BAD[0]] * 9)
    with pytest.raises(UserError, match="cannot be used"):
        run(folder, tmp_path / "out", tokenizer)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=f"interrupted conversion with another {name} .* or remove"):
        run(folder, tmp_path / "out", tokenizer, **options)
    assert contents(tmp_path / "out") == before


def test_too_many_faults_stop_with_the_reasons_and_leave_nothing_readable(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = source(tmp_path / "in", [*BAD[:1], *BAD[3:5], BAD[3]])
    with pytest.raises(
        UserError,
        match=r"4 of 13 entries .* more than the 1.0% allowed: 2 x image is missing, 1 x .*--max-faults 0.37",
    ):
        run(folder, tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match="UNFINISHED"):
        Dataset(tmp_path / "out" / "train")
    run(folder, tmp_path / "out", tokenizer, max_faults=0.4)
    assert len(Dataset(tmp_path / "out" / "train")) == 6


def test_finished_shards_are_not_touched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = source(tmp_path / "in")
    run(folder, tmp_path / "out", tokenizer)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds finished shards \(dev, train\)"):
        run(folder, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == before


def test_nothing_usable_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_lines(tmp_path / "in" / "captions.jsonl", [{"image": "a.jpg", "captions": ["x"]}])
    with pytest.raises(UserError, match="no entry that can be used, 1 were left out"):
        run(tmp_path / "in", tmp_path / "out", tokenizer, max_faults=1.0)


def test_a_field_that_is_no_split_is_found_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(encoded())
    rows = [{"image": "0.jpg", "captions": ["x"], "key": f"k{n}", "split": f"s{n}"} for n in range(40)]
    save_lines(tmp_path / "in" / "captions.jsonl", rows)
    with pytest.raises(UserError, match=r"more than 32 splits \(s0, s1, s2, ..., s32\); name another field"):
        run(tmp_path / "in", tmp_path / "out", tokenizer)


def test_a_key_may_not_be_in_two_splits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(encoded())
    rows = [{"image": "0.jpg", "captions": ["x"], "split": split} for split in ("train", "test")]
    save_lines(tmp_path / "in" / "captions.jsonl", rows)
    assert run(tmp_path / "in", tmp_path / "out", tokenizer, max_faults=1.0).faults == {"key comes twice": 1}


def test_text_that_is_no_unicode_passes_without_harm(tmp_path: Path, tokenizer: Tokenizer) -> None:
    caption = "A dog that is long enough to be kept in spite of one broken \ud83d character in its text."
    rows = [{"caption": caption, "url": "\udc80"}]
    save_webdataset(tmp_path / "0.tar", rows)
    members = [(f"\udcff{kind}", b"x" if kind == ".txt" else IMAGES[0]) for kind in (".jpg", ".txt", "2.jpg")]
    save_tar(tmp_path / "1.tar", members)
    found = Source(str(tmp_path / "?.tar"), load("img2dataset"))
    report = convert(found, tmp_path / "out", tokenizer=tokenizer, max_faults=1.0)
    assert report.faults == {"no captions": 1}
    kept = [Dataset(tmp_path / "out" / "train").record(index) for index in range(2)]
    assert "broken \N{REPLACEMENT CHARACTER} character" in kept[0].captions[0].text
    assert [record.meta for record in kept] == [{"image": "000000000", "url": "?"}, {"image": "?"}]


def test_a_full_disk_is_said_and_the_next_run_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = source(tmp_path / "in", good=40), []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"the disk of .* is full .* finished shards are kept"):
            run(folder, tmp_path / "out", tokenizer)
    run(folder, tmp_path / "out", tokenizer)
    run(folder, tmp_path / "whole", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n\t", "caption is empty"),
        ("word " * 5000, f"caption is longer than {LONGEST_CAPTION:,} characters"),
        ("\x00\x01\x02PNG", "caption is binary"),
        ("lone \ud83d", "caption is binary"),
        ("Ø\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}x", "caption is binary"),
        ("the " * 20, "caption repeats the same words"),
        ("a red car and " * 50, "caption repeats the same words"),
        ("no no no", None),
        ("A dog, a dog and a dog sit beside a dog.", None),
        ("猫が寝ている。", None),
        ("یک سگ می\u200cدود و نمی\u200cایستد", None),
        ("A family 👩\u200d🍳 cooks.", None),
        ("One line.\nAnother\tline.", None),
    ],
)
def test_absurd_captions_are_told_from_odd_ones(text: str, reason: str | None) -> None:
    assert absurd(text) == reason


def looked(folder: Path, tokenizer: Tokenizer, samples_per_shard: int = 1000) -> str:
    return describe(survey(Source(folder, load("jsonl")), Prepare(tokenizer)), samples_per_shard)


def test_the_survey_shows_samples_lengths_faults_and_advice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = looked(source(tmp_path / "in", BAD), tokenizer)
    assert text.count(" -> ") == 3
    assert "captions.jsonl:2 -> train/1.jpg" in text
    assert "      3  Photo 1." in text
    assert "  caption: 17 tokens, 2 sentences" in text
    assert "over 77, 0.0% over 248 tokens, longest " in text
    assert "left out: 1 x image is truncated, such as captions.jsonl:10: image is truncated" in text
    assert "note: 3 x image is CMYK, read as RGB" in text
    assert "about 11 images" in text
    assert "ranks x workers" in text


def test_the_survey_counts_what_it_has_not_seen_from_what_it_has(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    found = survey(Source(source(tmp_path / "in", good=60), load("jsonl")), Prepare(tokenizer), limit=20)
    assert (found.seen, found.images) == (20, 20)
    assert 50 < found.total < 70
    large = found._replace(bytes=20 * 10**6, total=100_000)
    assert "100,000 images, 100," in describe(large, 1000)
    assert "advice: --samples-per-shard 200 makes 500 shards of 200 MB" in describe(large, 1000)
    assert "advice" not in describe(large, 300)


def test_a_field_that_no_entry_has_is_pointed_at(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_images(tmp_path / "in", [f"{n}.jpg" for n in range(8)])
    save_lines(tmp_path / "in" / "data.jsonl", [{"image": f"{n}.jpg", "said": "A dog."} for n in range(8)])
    (tmp_path / "my.yaml").write_text(
        "about: x\nfiles: ['*.jsonl']\nimage: image\ncaptions: {a: said, b: siad}\n"
    )
    found = survey(Source(tmp_path / "in", load(str(tmp_path / "my.yaml"))), Prepare(tokenizer))
    assert "captions of b: NONE in 8 entries; is the field named so" in describe(found, 1000)


def test_a_dry_run_shows_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(tmp_path / "in")
    assert (
        cli.main(["shards", str(folder), "--out", str(tmp_path / "out"), "--dry-run", "--workers", "1"]) == 0
    )
    assert "tokens of a caption" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_command_converts_and_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["shards", str(source(tmp_path / "in")), "--out", str(out), "--workers", "1", "--held-out", "2"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "train: 6 images with 12 captions in 1 shards" in text
    assert f"next: python train.py data=shards data.root={out}" in text
    assert cli.main(command) == 2
    assert "already holds finished shards" in capsys.readouterr().err


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", str(tmp_path), "--layout", "docci", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_progress_lines_tell_rate_and_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def clock() -> Iterator[float]:
        yield from (0.0, 5.0, 10.0, 12.0)

    times = clock()
    lines = Lines(every=10.0, clock=lambda: next(times))
    for step in (Step(0.5, 1000, 0), Step(0.55, 1100, 0), Step(0.6, 1200, 3), Step(0.62, 1240, 3)):
        lines(step)
    assert capsys.readouterr().err == " 60%  1,200 images, 3 left out, 20/s, ETA 0:00:40\n"
