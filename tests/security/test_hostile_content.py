"""Images, JSON and words of a sample: too large, too deep, absurd, or written to be run."""

import json
import struct
import tarfile
import zlib

import pytest
import yaml
from hostile import HOSTILE, NESTED, entries, index_again, png, record, tar_of
from test_preview import Page

from longclip import models
from longclip.cli import main
from longclip.data.converting.layouts import Fault
from longclip.data.images import decode
from longclip.data.sidecars.store import Store
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.index import index_name, parse_index, parse_list
from longclip.preview import preview
from longclip.types import Caption, Record, Sentence, UserError


def bomb(width, height, extra=b""):
    """A PNG of a few hundred kilobytes or less that claims, and holds, that many black pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (min(width, 20_000) + 7) // 8)
    rows = b"".join(squeeze.compress(row) for _ in range(min(height, 20_000))) + squeeze.flush()
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_a_decompression_bomb_is_a_sentence():
    content = bomb(20_000, 20_000)
    assert len(content) < 200_000
    with pytest.raises(UserError, match="too large"):
        decode(content)
    with pytest.raises(UserError, match="too large"):
        decode(bomb(2**31 - 1, 2**31 - 1))


def test_a_bomb_in_a_text_chunk_is_no_image_either():
    squeezed = zlib.compress(bytes(200_000_000), 9)
    text = b"zTXt", b"Comment\0\0" + squeezed
    chunk = (
        struct.pack(">I", len(text[1])) + text[0] + text[1] + struct.pack(">I", zlib.crc32(b"".join(text)))
    )
    with pytest.raises(UserError, match="broken"):
        decode(bomb(8, 8, chunk))


NUMBERS = b"1" + b"0" * 5000  # Python refuses to convert so many digits


@pytest.mark.parametrize("content", [NESTED, b'{"version": ' + NUMBERS + b"}", b"\xff\xfe", b"null", b"[]"])
def test_hostile_json_is_a_sentence_wherever_it_is_read(tmp_path, content):
    for parse in (parse_index, parse_list):
        with pytest.raises(UserError):
            parse(content, str(tmp_path / "000000.index.json"))
    (tmp_path / "sidecar.json").write_bytes(content)
    with pytest.raises(UserError):
        Store(tmp_path)
    (tmp_path / "open_clip_config.json").write_bytes(content)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        models.load(str(tmp_path))
    (tmp_path / "config.yaml").write_bytes(content)
    assert main(["preview", str(tmp_path), "--recipe", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "content", [NESTED, b'{"image": ' + NUMBERS + b"}", b'{"image": 1e999}', b"null", b"[]"]
)
def test_hostile_rows_are_faults(tmp_path, content):
    (tmp_path / "captions.jsonl").write_bytes(content + b"\n")
    (fault,) = entries(tmp_path)
    assert isinstance(fault, Fault)
    (tmp_path / "captions.jsonl").unlink()
    tar = tar_of(tmp_path / "s.tar", ("k.png", png()), ("k.json", content), ("k.txt", b"A dog."))
    (fault,) = entries(tar, "img2dataset")
    assert isinstance(fault, Fault) or fault.captions == [("caption", "A dog.")]


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": [10**30]},
        {"sizes": [10**30]},
        {"lengths": [10**30]},
        {"crcs": [10**30]},
        {"crcs": ["1"]},
        {"offsets": [-512]},
        {"keys": [["k"]]},
        {"keys": None},
        {"samples": 10**12},
        {"samples": 1.0},
        {"bytes": 1e999},
        {"captions": "many"},
        {"sha256": 5},
        {"tokenizer": {"a": 1}},
        {"extra": 1},
    ],
    ids=str,
)
def test_an_index_with_absurd_numbers_is_a_sentence(tmp_path, change):
    folder = tmp_path / "train"
    shards.write([record()], folder)
    path = folder / index_name("000000.tar")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        Dataset(folder).record(0)


def _with_json(folder, described, tokenizer):
    """A whole, tokenised shard of one sample that holds this JSON."""
    shards.write([record()], folder, tokenizer_hash=tokenizer.name_hash)
    with tarfile.open(folder / "000000.tar") as tar:
        kept = [(m.name, tar.extractfile(m).read()) for m in tar if not m.name.endswith(".json")]
    tar_of(folder / "000000.tar", *kept, ("k.json", described))
    index_again(folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"sentences": [[0, 10**30]]},
        {"sentences": [[-5, 3]]},
        {"sentences": [[0.0, 2.5]]},
        {"sentences": 5},
        {"text": ["a"]},
        {"source": {"a": 1}},
        {"counts": [10**30]},
        {"counts": [-1]},
        {"boxes": [["<script>", 0, 1, 1]]},
        {"boxes": [[0, 1]]},
        {"boxes": [{"a": 1}]},
        {"boxes": [[0, 0, 10**400, 1]]},
    ],
    ids=str,
)
def test_a_sample_with_hostile_json_is_a_sentence_in_training_and_in_preview(tmp_path, tokenizer, change):
    told = {"source": "raw", "text": "A dog.", "sentences": [[0, 6]], "counts": [2]} | change
    described = json.dumps({"captions": [told], "meta": {}}).encode()
    folder = _with_json(tmp_path / "train", described, tokenizer)
    with pytest.raises(UserError):
        Dataset(folder, tokenizer).record(0)
    out = tmp_path / "p.html"
    preview(str(folder), "dreamlip", out, architecture="ViT-scenes")
    assert "<script" not in out.read_text()


def test_a_sample_with_bottomless_json_is_a_sentence(tmp_path, tokenizer):
    folder = _with_json(tmp_path / "train", NESTED, tokenizer)
    with pytest.raises(UserError):
        Dataset(folder, tokenizer).record(0)


def test_captions_sources_keys_and_names_are_inert_in_the_page(tmp_path, tokenizer):
    text, key = HOSTILE, "<b onmouseover=alert(1)>"
    told = Caption(HOSTILE, text, (Sentence(0, len(text), tokenizer.ids(text), (0.1, 0.1, 0.9, 0.9)),))
    folder = tmp_path / "<script>alert(2)</script>" / "train"
    shards.write([Record(key, png(), "png", (told,), {})], folder, tokenizer_hash=tokenizer.name_hash)
    recipe = {"recipe": {"captions": {HOSTILE: {"_target_": "longclip.captions.First"}}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "p.html"
    preview(str(folder), str(tmp_path / "r.yaml"), out, architecture="ViT-scenes")
    page = Page(out)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "b") and tag != "b"]
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert {a["src"][:22] for tag, a in page.tags if tag == "img"} == {"data:image/png;base64,"}
    assert page.text.count("<script>alert(1)</script>") >= 3
    assert "onmouseover=alert(1)" in page.text
