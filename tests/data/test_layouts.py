"""The jsonl layout: the same entries from a folder and from its tar, and a fault for every bad line."""

import json
import tarfile
from pathlib import Path

import pytest

from longclip.data.layouts import Entry, Fault, key_of, read
from longclip.data.shards import LONGEST_KEY
from longclip.types import UserError

GOOD = [
    {"image": "images/a.jpg", "captions": ["A dog.", "A cat."], "split": "dev"},
    {"image": "b.png", "captions": {"raw": "Alt.", "long": ["One.", "Two."]}, "licence": "CC0"},
    {"image": "images/sub/c.d.jpg", "captions": ["x"], "key": "mine"},
]


def source(
    folder: Path, lines: list[object], images: tuple[str, ...] = ("a.jpg", "b.png", "sub/c.d.jpg")
) -> Path:
    (folder / "images").mkdir(parents=True)
    for name in images:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text + "\n\n")
    return folder


def packed(folder: Path, inner: str) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, inner)
    return path


@pytest.mark.parametrize("inner", ["flickr8k", "."])
def test_a_folder_and_its_tar_hold_the_same_entries(tmp_path: Path, inner: str) -> None:
    folder = source(tmp_path / "data", GOOD)
    expected = [
        Entry(
            "dev", "a", b"a.jpg", [("caption", "A dog."), ("caption", "A cat.")], {"image": "images/a.jpg"}
        ),
        Entry(
            "train",
            "b",
            b"b.png",
            [("raw", "Alt."), ("long", "One."), ("long", "Two.")],
            {"image": "b.png", "licence": "CC0"},
        ),
        Entry("train", "mine", b"sub/c.d.jpg", [("caption", "x")], {"image": "images/sub/c.d.jpg"}),
    ]
    assert list(read(folder, "jsonl")) == expected
    assert list(read(tmp_path, "jsonl")) == expected
    assert list(read(packed(folder, inner), "jsonl")) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line is no JSON"),
        ("[1, 2]", "no image named"),
        ({"captions": ["x"]}, "no image named"),
        ({"image": 3, "captions": ["x"]}, "no image named"),
        ({"image": "images/gone.jpg", "captions": ["x"]}, "image is missing"),
        ({"image": "../secret.jpg", "captions": ["x"]}, "image is missing"),
        ({"image": "images/a.jpg", "captions": "A dog."}, "captions are no list of texts"),
        ({"image": "images/a.jpg", "captions": list("A dog.")}, "captions are no list of texts"),
        ({"image": "images/a.jpg", "captions": [["A dog."]]}, "captions are no list of texts"),
        ({"image": "images/a.jpg"}, "captions are no list of texts"),
        ({"image": "images/a.jpg", "captions": ["x"], "split": "../../etc"}, "split is no plain name"),
        ({"image": "images/a.jpg", "captions": ["x"], "split": 3}, "split is no plain name"),
        ({"image": "images/a.jpg", "captions": ["x"], "key": 3}, "key is no text"),
    ],
)
@pytest.mark.parametrize("tar", [False, True])
def test_a_bad_line_is_a_fault_and_the_next_is_read(
    tmp_path: Path, line: object, reason: str, tar: bool
) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"not yours")
    folder = source(tmp_path / "data", [line, GOOD[0]])
    bad, good = read(packed(folder, "x") if tar else folder, "jsonl")
    assert isinstance(bad, Fault)
    assert bad.reason == reason
    assert isinstance(good, Entry)


def test_absolute_paths_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"not yours")
    folder = source(tmp_path / "data", [{"image": str(tmp_path / "secret.jpg"), "captions": ["x"]}])
    assert [fault.reason for fault in read(folder, "jsonl") if isinstance(fault, Fault)] == [
        "image is missing"
    ]


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    folder = source(tmp_path / "data", [{"image": "images/link.jpg", "captions": ["x"]}], images=())
    (folder / "images" / "link.jpg").symlink_to("/etc/hostname")
    assert [type(found) for found in read(packed(folder, "x"), "jsonl")] == [Fault]


def test_source_without_a_listing_says_what_it_looks_like(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'found no captions.jsonl. It has a line {"image"'):
        list(read(tmp_path, "jsonl"))
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nowhere", "jsonl")
    with pytest.raises(UserError, match="choose one of jsonl"):
        read(tmp_path, "json")


def test_two_listings_are_refused(tmp_path: Path) -> None:
    source(tmp_path / "a", GOOD)
    source(tmp_path / "b", GOOD)
    with pytest.raises(UserError, match=r"found a/captions.jsonl, b/captions.jsonl"):
        list(read(tmp_path, "jsonl"))


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source(tmp_path / "data", GOOD), "data")
    with pytest.raises(UserError, match="neither a folder nor an uncompressed tar"):
        read(path, "jsonl")


def test_keys_are_short_plain_and_told_apart() -> None:
    assert key_of("images/1_a.jpg") == "1_a"
    assert key_of("./images/x/é 1.v2.jpeg") == "x_é_1_v2"
    long = [key_of(f"{'d' * 200}/{number}.jpg") for number in range(2)]
    assert long[0] != long[1]
    assert all(len(key.encode()) <= LONGEST_KEY for key in long)
