"""Members, checkpoints, archives, side-cars: what a pickle would do is never done."""

import json
import pickle
import struct
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from hostile import Bomb, checkpoint, index_again, record, tar_of

from longclip import models
from longclip.cli import main
from longclip.data.converting.layouts import Source, load
from longclip.data.sidecars.store import Store
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.stored import Stored
from longclip.towers import formats
from longclip.towers.pretrained import build
from longclip.types import UserError


@pytest.mark.parametrize("kind", ["pyd", "pickle", "pkl", "pt", "pth", "npy"])
def test_members_that_hold_pickles_are_never_unpickled(tmp_path, marker, kind):
    """A shard with such a member in each sample, whose index is in order."""
    payload = pickle.dumps(Bomb(marker))
    folder = tmp_path / "train"
    shards.write([record()], folder)
    with tarfile.open(folder / "000000.tar") as tar:
        kept = [(m.name, tar.extractfile(m).read()) for m in tar]
    tar_of(folder / "000000.tar", *kept, (f"k.{kind}", payload))
    index_again(folder)
    assert Dataset(folder).record(0).key == "k"
    source = tar_of(tmp_path / "source.tar", *kept, (f"k.{kind}", payload))
    found = list(Source(source, load("img2dataset")))
    assert len(found) == 1


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_that_runs_code_is_refused_wherever_one_is_read(tmp_path, marker, old):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "step-000000001.ckpt"
    torch.save(
        {"longclip": {}, "state_dict": {"a": Bomb(marker)}}, path, _use_new_zipfile_serialization=not old
    )
    weights = tmp_path / "weights.pt"
    weights.write_bytes(path.read_bytes())
    for name in (str(run), str(path)):  # eval.run model=RUN, model=FILE
        with pytest.raises(UserError):
            models.load(name)
    with pytest.raises(UserError):
        build("ViT-B-32", str(weights), None)  # model.backbone.weights=FILE
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert main(["import", str(weights), "--out", str(tmp_path / "out")]) == 2


def test_resuming_from_a_checkpoint_that_runs_code_does_not_run_it(tmp_path, marker):
    folder = tmp_path / "step-000000001.ckpt"
    folder.mkdir()
    checkpoint(folder / "00001-of-00001.safetensors", {"state_dict": {}, "x": Bomb(marker)})
    (tmp_path / "file.ckpt").write_bytes((folder / "00001-of-00001.safetensors").read_bytes())
    for path in (folder, tmp_path / "file.ckpt"):
        with pytest.raises(UserError):
            Stored(path)


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/constants.pkl"])
def test_an_archive_that_runs_code_is_refused(tmp_path, marker, name):
    path = tmp_path / "openai.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("archive/data.pkl", "archive/constants.pkl", "archive/version"):
            archive.writestr(member, pickle.dumps(Bomb(marker), protocol=2) if member == name else b"3")
    with pytest.raises(UserError):
        formats.read(path)


def zipped(path, content, *others):
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("archive/data.pkl", "archive/version", *others):
            archive.writestr(member, content if member.endswith("data.pkl") else b"3")
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02ctorch\n\xfe\n.",  # UnicodeDecodeError
        b"\x80\x02h\x07.",  # KeyError
        b"\x80\x02}s.",  # IndexError
        b"\x80\x02X\x01\x00",  # struct.error
        b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02tR.",  # TypeError
    ],
)
@pytest.mark.parametrize("others", [(), ("archive/constants.pkl",)])
def test_a_damaged_pickle_is_a_sentence(tmp_path, content, others):
    with pytest.raises(UserError):
        formats.read(zipped(tmp_path / "w.pt", content, *others))
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(UserError):
        formats.read(tmp_path / "old.pt")


@pytest.mark.parametrize("attribute", [b"X\x01\x00\x00\x00a", b"K\x05"], ids=["itself", "no text"])
def test_a_module_that_no_program_wrote_is_a_sentence(tmp_path, attribute):
    """It holds itself, as an attribute."""
    content = b"\x80\x02c__torch__\nM\n)\x81q\x00}" + attribute + b"h\x00sb."
    with pytest.raises(UserError, match="TorchScript archive"):
        formats.read(zipped(tmp_path / "w.pt", content, "archive/constants.pkl"))


@pytest.mark.parametrize(
    ("at", "byte"),
    [(-1, 0), (6, 99), (46, 0xFE)],  # of the directory: what was damaged in it
    ids=["content", "version", "name"],
)
def test_a_damaged_zip_is_a_sentence(tmp_path, at, byte):
    path = checkpoint(tmp_path / "w.pt", {"x": Counter()})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[content.index(b"collections") if at < 0 else directory + at] = byte
    path.write_bytes(content)
    with pytest.raises(UserError):
        formats.read(path)


def safetensors_file(path, header, body=b"", length=None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    return path


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 50_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        json.dumps({"a": TENSOR | {"data_offsets": [0, 2**62]}}).encode(),
        json.dumps({"a": TENSOR | {"data_offsets": [-8, 0]}}).encode(),
        json.dumps({"a": TENSOR | {"shape": [2**40, 2**40]}}).encode(),
        json.dumps({"a": TENSOR | {"dtype": "pickle"}}).encode(),
        json.dumps({"a": TENSOR, "b": TENSOR}).encode(),
        b'{"a": 1e999}',
    ],
    ids=["braces", "nested", "beyond", "negative", "huge", "dtype", "overlap", "number"],
)
def test_a_malicious_safetensors_header_is_a_sentence(tmp_path, header):
    with pytest.raises(UserError):
        formats.read(safetensors_file(tmp_path / "w.safetensors", header, bytes(8)))
    with pytest.raises(UserError):
        formats.read(safetensors_file(tmp_path / "v.safetensors", header, bytes(8), length=2**63))


def test_a_sidecar_with_pickled_objects_is_a_sentence(tmp_path, marker):
    described = {"version": 1, "rows": 1, "example": "k", "tokenizer": "", "columns": {"score": "number"}}
    (tmp_path / "sidecar.json").write_text(json.dumps(described))
    np.save(tmp_path / "keys.npy", np.zeros((1, 2), np.uint64))
    np.save(tmp_path / "score.npy", np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError):
        Store(tmp_path)
    described["columns"] = {"../../score": "number"}
    (tmp_path / "sidecar.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="proper name"):
        Store(tmp_path)
