"""What somebody hostile might send, in pieces that tests put together."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from array import array

import torch
from PIL import Image

from longclip.data.converting.layouts import Source, load
from longclip.data.tars.index import index_name
from longclip.types import Caption, Record, Sentence

NESTED = b"[" * 200_000
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}$title"


class Bomb:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def png(width=8, height=8):
    written = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 200)).save(written, "PNG")
    return written.getvalue()


def record(key="k", text="A dog.", source="raw", image=None, meta=None):
    told = Caption(source, text, (Sentence(0, len(text), array("H", (5, 6))),))
    return Record(key, image or png(), "png", (told,), meta or {})


def tar_of(path, *members):
    """A tar of (TarInfo or name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def checkpoint(path, content):
    """A file of torch.save whose pickle holds `content`."""
    torch.save(content, path)
    return path


def entries(source, layout="jsonl"):
    return list(Source(source, load(layout)))


def index_again(folder):
    """Make index and list say what the one tar holds now, as one sample."""
    tar, path = folder / "000000.tar", folder / index_name("000000.tar")
    index, listed = json.loads(path.read_text()), json.loads((folder / "shards.json").read_text())
    content = tar.read_bytes()
    end = len(content.rstrip(b"\0")) + 511 & ~511
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    index |= new | {"sizes": [end], "crcs": [zlib.crc32(content[:end])]}
    listed["shards"][0] |= new
    path.write_text(json.dumps(index))
    (folder / "shards.json").write_text(json.dumps(listed))
