"""Eight samples of a data set as it may arrive, and how each layout would hold them.

0  plain              4  the image is broken
1  no caption         5  an RGBA picture
2  a list of two      6  a CMYK picture
3  `</s>`, a newline  7  not ASCII
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

TEXTS: list[str | list[str] | None] = [
    "A dog runs. It is brown.",
    None,
    ["Two cats sleep.", "They are white."],
    "A car.\nIt is red.</s>Its door is open.",
    "The picture is broken.",
    "A see-through ghost.",
    "Printed in four colours.",
    "Ein Café in Köln. Draußen stehen 猫。",
]
KEPT = [0, 2, 3, 5, 6, 7]  # those with an image and a caption
LINES = [["A dog runs.", "It is brown."], [], ["Two cats sleep.", "They are white."]]


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [
    encoded("JPEG"),
    encoded("PNG"),
    encoded("WEBP"),
    encoded("PNG", "P"),
    encoded("JPEG")[:-40],
    encoded("PNG", "RGBA"),
    encoded("JPEG", "CMYK"),
    encoded("JPEG", "L"),
]


def save_images(folder: Path, names: Iterable[str]) -> None:
    for name, image in zip(names, IMAGES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)


def save_lines(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def save_table(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        for row in rows:  # None becomes an empty cell, a list what Python prints of it
            table.writerow(row)
    return path


def save_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def webdataset(path: Path, rows: list[dict[str, object]], prefix: str = "0000000") -> Path:
    """As img2dataset writes it: KEY.jpg whatever the image is, KEY.txt, KEY.json."""
    members = []
    for number, row in enumerate(rows):
        key = f"{prefix}{number:02d}"
        members += [
            (f"{key}.jpg", IMAGES[number]),
            (f"{key}.txt", str(row.get("caption") or "").encode(errors="replace")),
            (f"{key}.json", json.dumps({"key": key, "status": "success", **row}).encode()),
        ]
    (path.parent / f"{path.stem}_stats.json").write_text('{"successes": 8}')
    return save_tar(path, members)
