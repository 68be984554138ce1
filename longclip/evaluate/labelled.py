"""Labelled pictures as people keep them: folders of classes, CIFAR's binary files, CLIP_benchmark's tars.

In: a root, and which folder of it. Out: `Labelled`: pictures with their label, and what the folder says of
names and prompts. CIFAR's Python version is a pickle, which can run anything: it is refused, not opened.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.converting.layouts.files import Place, Unusable, members, open_tar
from ..types import UserError
from .showing import Load, Picture, absent, opened

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_AGAIN = "export the set again"


class Item(NamedTuple):
    key: str
    label: int
    load: Load


class Labelled(NamedTuple):
    items: list[Item]
    names: list[str]  # by label
    templates: list[str]  # empty where the set brings none


def folders(root: str, folder: str) -> Labelled:
    """ROOT/FOLDER/CLASS/*.jpg, ImageNet's layout; where FOLDER is "", the classes lie in ROOT itself.

    Labels follow the sorted names of the folders, or are those names where all are numbers (ImageNetV2). A
    class is called what its line of ROOT/classnames.txt says, else as its folder, with blanks for "_".

    Raises:
        UserError: there are no such folders, or names that are not as many as they.
    """
    tree = (
        f"{posixpath.join(folder, 'CLASS', 'PICTURE.jpg')}   (a folder for every class)\n{NAMES}   (optional)"
    )
    base = opened(root, tree).root / folder
    classes = sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    classes = [name for name in classes if not name.startswith((".", "__"))]
    if not classes:
        raise UserError(absent(root, f"has no class folders in {base}", tree))
    numbered = all(name.isdecimal() for name in classes)
    labels = {name: int(name) if numbered else label for label, name in enumerate(classes)}
    items = [
        Item(posixpath.join(name, path.name), labels[name], Picture(Place(str(path))))
        for name in classes
        for path in sorted((base / name).iterdir())
        if path.suffix.lower() in PICTURES
    ]
    own = {label: name.replace("_", " ") for name, label in labels.items()}
    names = _lines(Path(root), NAMES)
    if names and not numbered:
        _check_counts(Path(root) / NAMES, len(names), base, len(classes))
    names = names or [own.get(label, "") for label in range(max(own) + 1)]
    return Labelled(items, names, _lines(Path(root), TEMPLATES))


def _check_counts(listing: Path, names: int, base: Path, classes: int) -> None:
    """Labels that follow the sorted folders say whose a line is only where there are as many of both."""
    if names != classes:
        raise UserError(
            f"{listing} has {names} lines, and {base} has {classes} class folders: write one line for each "
            "folder, in the order of their sorted names, or remove the file, and classes are called as their "
            "folders"
        )


def cifar(root: str, folder: str) -> Labelled:
    """CIFAR-10 or -100 in its binary version (cs.toronto.edu/~kriz/cifar.html), its test pictures.

    A record is one label byte (two in CIFAR-100, the fine one last), then 3072 of pixels, planes of 32 x 32.
    """
    tree = "cifar-10-batches-bin/test_batch.bin and batches.meta.txt, or\n"
    tree += "cifar-100-binary/test.bin and fine_label_names.txt   (the binary version)"
    opened(root, tree)
    for version, file, meta, labels in (
        ("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", 1),
        ("cifar-100-binary", "test.bin", "fine_label_names.txt", 2),
    ):
        for base in (Path(root), Path(root) / version):
            if (base / file).is_file() and (base / meta).is_file():
                names = [name.replace("_", " ") for name in _lines(base, meta)]
                return Labelled(_records(base / file, labels), names, [])
    pickled = [name for name in ("cifar-10-batches-py", "cifar-100-python") if (Path(root) / name).is_dir()]
    what = f"holds {pickled[0]}, which are pickles and never opened" if pickled else "holds no binary CIFAR"
    raise UserError(absent(root, what, tree))


def _records(path: Path, labels: int) -> list[Item]:
    size = labels + 3072
    if path.stat().st_size % size:
        raise UserError(f"{path} has {path.stat().st_size} bytes, no multiple of {size}: download it again")
    records_NB = np.memmap(path, np.uint8, "r").reshape(-1, size)
    return [
        Item(f"{path.stem}/{n:05d}", int(row[labels - 1]), partial(_pixels, row[labels:]))
        for n, row in enumerate(records_NB)
    ]


def _pixels(planes: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(planes.reshape(3, 32, 32).copy())


def webdataset(root: str, folder: str) -> Labelled:
    """CLIP_benchmark's layout: ROOT/FOLDER/0.tar, 1.tar ... of KEY.webp|png|jpg and KEY.cls, a number."""
    tree = f"{folder}/nshards.txt\n{folder}/0.tar, 1.tar, ...   (KEY.jpg|png|webp and KEY.cls)\n{NAMES}\n"
    tree += f"{TEMPLATES}   (with {{c}} for the name)"
    base = opened(root, tree).root
    tars = sorted((base / folder).glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
    counted = _lines(base / folder, "nshards.txt")
    if not tars or not _lines(base, NAMES):
        raise UserError(absent(root, f"lacks {NAMES if tars else f'{folder}/*.tar'}", tree))
    if counted and counted[0] != str(len(tars)):
        raise UserError(
            f"{base / folder}: nshards.txt says {counted[0]} tars, found {len(tars)}: get the rest"
        )
    items = [item for tar in tars for item in _of_tar(tar)]
    return Labelled(items, _lines(base, NAMES), _lines(base, TEMPLATES))


def _of_tar(path: Path) -> Iterator[Item]:
    for stem, found in _parts(path).items():
        picture = next((found[kind] for kind in PICTURES if kind in found), None)
        if picture is None or ".cls" not in found:
            raise UserError(
                f"{path}: {stem} has only {', '.join(found)}, and needs a picture and .cls: {_AGAIN}"
            )
        label = found[".cls"].read()
        if not label.strip().isdigit():
            raise UserError(
                f"{path}: {stem}.cls holds {label[:20]!r} where a label, a number, belongs: {_AGAIN}"
            )
        yield Item(f"{path.stem}/{stem}", int(label), Picture(picture))


def _parts(path: Path) -> dict[str, dict[str, Place]]:
    """Where the members of every sample lie, by extension."""
    parts: dict[str, dict[str, Place]] = {}
    try:
        with open_tar(path) as tar:
            for member in members(tar):
                stem, kind = posixpath.splitext(posixpath.normpath(member.name))
                parts.setdefault(stem, {})[kind.lower()] = Place(str(path), member.offset_data, member.size)
    except Unusable as error:
        raise UserError(f"{error.detail}; download it again") from error
    return parts


def _lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    return [line.strip() for line in path.read_text("utf-8").strip().splitlines()] if path.is_file() else []


READERS: dict[str, Callable[[str, str], Labelled]] = {
    "folders": folders,
    "cifar": cifar,
    "webdataset": webdataset,
}
