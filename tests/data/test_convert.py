"""Conversion: deterministic, complete, and every entry left out is named."""

import io
import json
from pathlib import Path

import open_clip
import pytest
from PIL import Image

from longclip.data.convert import ConversionReport, convert
from longclip.data.dataset import Dataset
from longclip.tokens import Tokenizer
from longclip.types import UserError

MODES = {"rgb": "RGB", "grey": "L", "cmyk": "CMYK"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 248)


def encoded(kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((20, 12)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def source(folder: Path, extra: list[dict[str, object]] | None = None) -> Path:
    """Nine good entries in two splits, then whatever a test adds."""
    images = folder / "images"
    images.mkdir(parents=True)
    entries: list[dict[str, object]] = []
    for number in range(9):
        name = f"{number}.jpg"
        (images / name).write_bytes(encoded(mode=list(MODES.values())[number % 3]))
        captions = [f"Photo {number}. It shows a dog, e.g. a poodle.", f"A {'very ' * 10 * number}big dog."]
        entries.append(
            {"image": f"images/{name}", "captions": captions, "split": "dev" if number % 3 == 2 else "train"}
        )
    (images / "half.jpg").write_bytes(encoded()[:-20])
    (images / "page.jpg").write_bytes(b"<html>not found</html>")
    (images / "empty.png").write_bytes(b"")
    (images / "rgba.jpg").write_bytes(encoded("PNG", "RGBA"))  # a PNG by another name
    lines = [json.dumps(entry) for entry in [*entries, *(extra or [])]]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


BAD: list[dict[str, object]] = [
    {"image": "images/half.jpg", "captions": ["x y"]},
    {"image": "images/page.jpg", "captions": ["x y"]},
    {"image": "images/empty.png", "captions": ["x y"]},
    {"image": "images/gone.jpg", "captions": ["x y"]},
    {"image": "images/0.jpg", "captions": ["x y"]},
    {"image": "images/rgba.jpg", "captions": ["x y", "  "]},
    {"image": "images/rgba.jpg", "captions": []},
    {"image": "images/rgba.jpg", "captions": "x y"},
]


def run(folder: Path, out: Path, tokenizer: Tokenizer, **options: object) -> ConversionReport:
    return convert(folder, "jsonl", out, samples_per_shard=4, tokenizer=tokenizer, **options)  # type: ignore[arg-type]


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
    expected = [2 + len(tokenizer.ids(f"A {'very ' * 10 * n}big dog.")) for n in range(9)]
    assert sum(report.lengths.values()) == 18
    assert max(report.lengths) == max(expected)
    assert report.share_over(77) == sum(length > 77 for length in expected) / 18
    assert "5.6% over 77 tokens, 0.0% over 248 tokens" in str(report)


def test_two_conversions_are_identical(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = source(tmp_path / "in")
    for name in "ab":
        run(folder, tmp_path / name, tokenizer)
    paths = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(paths) == 9
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in paths)


def test_every_fault_is_counted_and_listed_with_its_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    seen: list[int] = []
    report = run(
        source(tmp_path / "in", BAD), tmp_path / "out", tokenizer, max_fault_share=0.5, progress=seen.append
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
    assert [(item["key"], item["reason"]) for item in listed][:2] == [
        ("half", "image is truncated"),
        ("page", "image is no JPEG, PNG or WebP"),
    ]
    assert len(listed) == 8
    assert seen == list(range(1, 18))


def test_extension_follows_the_bytes_not_the_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run(
        source(tmp_path / "in", [{"image": "images/rgba.jpg", "captions": ["A gradient."]}]),
        tmp_path / "out",
        tokenizer,
    )
    last = Dataset(tmp_path / "out" / "train", tokenizer).record(6)
    assert (last.key, last.extension) == ("rgba", "png")


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
    run(folder, tmp_path / "out", tokenizer, max_fault_share=0.4)
    assert len(Dataset(tmp_path / "out" / "train")) == 6


def test_finished_shards_are_not_touched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = source(tmp_path / "in")
    run(folder, tmp_path / "out", tokenizer)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"already holds finished shards \(dev, train\)"):
        run(folder, tmp_path / "out", tokenizer)
    assert before == {path: path.read_bytes() for path in before}


def test_nothing_usable_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "captions.jsonl").write_text('{"image": "a.jpg", "captions": ["x"]}\n')
    with pytest.raises(UserError, match="no entry that can be used, 1 were left out"):
        run(folder, tmp_path / "out", tokenizer, max_fault_share=1.0)
