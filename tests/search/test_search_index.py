"""A picture is embedded once, as open_clip would, whatever happens to the run or to the folder."""

import os

import open_clip
import pytest
import torch
from noise import draw
from PIL import Image
from torch.nn import functional as F

from longclip.search import _name, index
from longclip.search.folder import walk
from longclip.search.index import build
from longclip.search.store import Store
from longclip.types import UserError


class Calls:
    """Remembers how many pictures were embedded."""

    def __init__(self):
        self.done = self.total = 0

    def __call__(self, done, total):
        self.done, self.total = done, total


@pytest.fixture
def rebuild(photos, embedder, tmp_path):
    """Bring the index up to date: (index, how many pictures that took)."""

    def built():
        calls = Calls()
        return build(walk(photos), embedder, Store(tmp_path / "cache"), calls), calls.done

    return built


def test_embeddings_are_those_of_open_clip(photos, rebuild, backbone):
    draw(photos / "wide.png", 9, size=(60, 31))
    found, _ = rebuild()
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**backbone.preprocess_cfg), is_train=False
    )
    pixels = torch.stack([preprocess(Image.open(found.path(n))) for n in range(len(found.files))])
    with torch.no_grad():
        wanted_NE = F.normalize(backbone.model.eval().encode_image(pixels), dim=-1)
    assert [file.path for file in found.files] == sorted(file.path for file in found.files)
    wide = [file.path for file in found.files].index("wide.png")
    exact = [n for n in range(len(found.files)) if n != wide]
    assert torch.allclose(found.image_NE[exact], wanted_NE[exact], atol=1e-5)
    assert torch.allclose(found.image_NE[wide], wanted_NE[wide], atol=0.02)  # resized: a grey level


def test_what_is_known_is_not_embedded_again(rebuild):
    first, took = rebuild()
    again, none = rebuild()
    assert (took, none) == (6, 0)
    assert again.files == first.files
    assert torch.equal(again.image_NE, first.image_NE)


def test_only_what_was_added_or_changed_is_embedded_and_what_is_gone_is_forgotten(photos, rebuild, tmp_path):
    before, _ = rebuild()
    vectors = dict(zip([file.path for file in before.files], before.image_NE, strict=True))
    draw(photos / "new.png", 100)
    (photos / "a/1.png").unlink()
    draw(photos / "a/3.png", 101)
    found, took = rebuild()
    after = dict(zip([file.path for file in found.files], found.image_NE, strict=True))
    assert (took, found.embedded, found.gone) == (2, 2, 2)
    assert after.keys() == (vectors.keys() | {"new.png"}) - {"a/1.png"}
    same = {path for path in after if path in vectors and torch.equal(after[path], vectors[path])}
    assert same == after.keys() - {"new.png", "a/3.png"}
    assert len(Store(tmp_path / "cache").read()) == 6


def test_a_killed_run_goes_on_where_it_was(photos, rebuild, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "PART", 2)
    whole, _ = rebuild()
    store = Store(tmp_path / "other")

    def killed(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(walk(photos), embedder, store, killed)
    calls = Calls()
    found = build(walk(photos), embedder, store, calls)
    assert calls.total == 2
    assert torch.equal(found.image_NE, whole.image_NE)
    assert len(list(store.folder.iterdir())) == 1  # parts are put together at the end


def test_a_torn_part_is_as_if_it_were_not_there(rebuild, tmp_path):
    whole, _ = rebuild()
    (part,) = (tmp_path / "cache").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-100])
    found, took = rebuild()
    assert took == 6
    assert torch.equal(found.image_NE, whole.image_NE)


def test_damaged_pictures_are_named_and_the_others_searched(photos, rebuild):
    (photos / "a/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    (photos / "empty.webp").touch()
    for _ in range(2):  # they are tried again every time
        found, _ = rebuild()
        assert {file.path: why for file, why in found.damaged.items()} == {
            "a/torn.jpg": "image is broken",
            "empty.webp": "image is empty",
        }
        assert len(found.files) == 6


def test_other_files_are_counted_and_nothing_outside_is_touched(photos, tmp_path):
    outside = draw(tmp_path / "outside" / "secret.png", 1)
    (photos / "link.png").symlink_to(outside)
    (photos / "inside.png").symlink_to(photos / "a/1.png")
    (photos / "linked").symlink_to(outside.parent)
    draw(photos / ".hidden" / "x.png", 2)
    (photos / "notes.txt").touch()
    os.mkfifo(photos / "pipe.png")
    found = walk(photos)
    assert [file.path for file in found.pictures if "/" not in file.path] == ["inside.png"]
    assert len(found.pictures) == 7
    assert found.passed_over == {".txt": 1, "links out of the folder": 1, "linked folders": 1}


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(UserError, match=r"holds no picture .*1 \.heic"):
        walk(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        walk(tmp_path / "a.heic")


def test_a_folder_of_damaged_pictures_names_the_first(photos, rebuild):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of 6 pictures .* a/1\.png: image is no JPEG"):
        rebuild()


def test_names_of_any_bytes_are_kept_and_can_be_printed(photos, rebuild):
    os.rename(os.fsencode(photos / "a/1.png"), os.fsencode(photos) + b"/a/\xff\x1b[31m.png")
    for took in (6, 0):
        found, embedded = rebuild()
        assert embedded == took
    (odd,) = [file for file in found.files if "31m" in file.path]
    assert odd.shown == "a/\ufffd\ufffd[31m.png"


def test_every_folder_and_model_has_its_own_place(tmp_path):
    places = {_name(tmp_path / folder, model) for folder in "ab" for model in ("1", "2")}
    assert len(places) == 4
