"""Shard lists and streams: an address runs nothing, and members are plain files."""

import json
import pickle
import tarfile

import pytest
from hostile import NESTED, Bomb, link, png, record, tar_of

from longclip.captions import Groups, Whole
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.data.streams.streaming import Tars
from longclip.data.streams.tape import Members, samples
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.index import parse_list
from longclip.data.tars.storage import Storage
from longclip.types import UserError


def test_pipe_addresses_run_nothing(marker, tokenizer):
    address = f"pipe:touch {marker}"
    for read in (Storage().read_all, Storage().exists, lambda url: Storage().read(url, 0, 1)):
        with pytest.raises(UserError, match="pipe"):
            read(address)
    with pytest.raises(UserError):
        Dataset(address)
    for root, train in ((address, "train"), (str(marker.parent), address), ("s3://b", f"{address} && ls")):
        data = DataModule(
            root=root,
            train=train,
            judge=[],
            plan=Plan(samples=1, batch_size=1),
            groups=Groups({"a": Whole()}, seed=0),
            tokenizer=tokenizer,
            preprocess={"size": 8, "resize_mode": "shortest", "interpolation": "bicubic"},
        )
        with pytest.raises(UserError):
            data.setup("fit")


@pytest.mark.parametrize("urls", ["pipe:touch {}", ["{{0..1}}.tar", "pipe:touch {}"], "pipe:{{touch,}} {}"])
def test_streams_run_nothing(marker, urls):
    told = [url.format(marker) for url in ([urls] if isinstance(urls, str) else urls)]
    with pytest.raises(UserError, match="pipe"):
        list(samples(told[-1], Storage()))
    with pytest.raises(UserError):
        Tars(told, captions={"raw": "txt"}).expanded  # noqa: B018 - a property that reads


def test_a_stream_takes_plain_members_only(tmp_path, marker):
    payload = pickle.dumps(Bomb(marker))
    tar = tar_of(
        tmp_path / "s.tar",
        ("a.png", png()),
        ("a.pyd", payload),
        ("a.json", NESTED),
        (link("b.png", "/etc/passwd"), b""),
        (link("b.txt", "a.json", tarfile.LNKTYPE), b""),
        ("../../c.png", png()),
    )
    found = [item for item in samples(str(tar), Storage()) if isinstance(item, Members)]
    assert [sorted(item.members) for item in found if item.key == "b"] in ([], [[]])
    assert {item.key for item in found} >= {"a"}


def test_a_shard_list_names_shards_and_nothing_else(tmp_path):
    shards.write([record()], tmp_path / "train")
    listed = json.loads((tmp_path / "train" / "shards.json").read_text())
    for name in ("../000000.tar", "/etc/passwd", "pipe:touch x", "http://evil/000000.tar", "000000.tar\n"):
        listed["shards"][0]["name"] = name
        with pytest.raises(UserError, match="named"):
            parse_list(json.dumps(listed).encode(), "shards.json")
