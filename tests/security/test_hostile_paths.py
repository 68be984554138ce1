"""Names in sources, tars and indices lead nowhere but where they should."""

import json
import tarfile
from pathlib import Path

import pytest
from hostile import entries, link, png, record, tar_of

from longclip.cli import main
from longclip.data.converting.layouts import Entry, Fault
from longclip.data.tars import shards
from longclip.types import UserError


@pytest.fixture
def secret(tmp_path):
    """An image outside of the source, which must not come in."""
    path = tmp_path / "secret.png"
    path.write_bytes(png(9, 9))
    return path


def images(found):
    return [e.image if isinstance(e.image, bytes) else e.image.read() for e in found if isinstance(e, Entry)]


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "{absolute}", "images/../../secret.png"]
)
def test_image_paths_do_not_leave_the_source(tmp_path, secret, name):
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    line = {"image": name.format(absolute=secret), "captions": ["A dog."]}
    (folder / "captions.jsonl").write_text(json.dumps(line) + "\n")
    (fault,) = entries(folder)
    assert isinstance(fault, Fault)
    assert fault.reason == "path leads out of the source"


def test_links_out_of_the_source_are_not_followed(tmp_path, secret):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.png").symlink_to(secret)
    (folder / "deep").symlink_to(tmp_path)
    lines = [{"image": name, "captions": ["A dog."]} for name in ("a.png", "deep/secret.png")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [fault.reason for fault in entries(folder)] == ["link leads out of the source"] * 2
    (folder / "captions.jsonl").unlink()
    (folder / "a.txt").write_text("A dog.")
    assert images(entries(folder, "folder")) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_not_images(tmp_path, secret, kind):
    listing = json.dumps({"image": "a.png", "captions": ["A dog."]}).encode()
    tar = tar_of(tmp_path / "s.tar", (link("a.png", str(secret), kind), b""), ("captions.jsonl", listing))
    assert images(entries(tar)) == []


@pytest.mark.parametrize("name", ["../../k.png", "/tmp/longclip-evil/k.png", "a/../../../k.png"])
def test_members_with_paths_outside_write_nothing_outside(tmp_path, name, capsys):
    """Through the whole conversion: only OUT appears."""
    stem = name.removesuffix(".png")
    tar = tar_of(tmp_path / "00000.tar", (name, png()), (f"{stem}.txt", b"A dog runs."))
    before = set(tmp_path.rglob("*"))
    arguments = ["--layout", "img2dataset", "--out", str(tmp_path / "out"), "--workers", "1"]
    code = main(["shards", str(tar), *arguments])
    capsys.readouterr()
    made = set(tmp_path.rglob("*")) - before
    assert all(path == tmp_path / "out" or (tmp_path / "out") in path.parents for path in made)
    assert not Path("/tmp/longclip-evil").exists()
    if code == 0:
        with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as written:
            assert all("/" not in member.name and ".." not in member.name for member in written)


@pytest.mark.parametrize("split", ["../out", "/etc", "a/b", "..", "", "a\0b", "train\n"])
def test_a_split_is_a_plain_name(tmp_path, split):
    (tmp_path / "a.png").write_bytes(png())
    line = {"image": "a.png", "captions": ["A dog."], "split": split}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    (found,) = entries(tmp_path)
    assert isinstance(found, Fault) or found.split == "train"


@pytest.mark.parametrize("key", ["../k", "a/b", "/abs", "..", "a.b", "k\0", "k\n", "", "k" * 200])
def test_a_key_cannot_name_a_path(tmp_path, key):
    with pytest.raises(UserError, match="key"):
        shards.write([record(key)], tmp_path / "out")
