"""Small folders in the layout of each published set: three images, the third of which is odd in some way.

Each builder returns what the set's protocol makes of them: the texts of each key.
"""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

LONG = "A red car.\nIt is parked 3.5 m away. The DOOR is open."
REJOINED = "A red car. It is parked 3. 5 m away. The DOOR is open"


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((40, 24)).rotate(60 * shade).convert("RGB").save(path, "JPEG")


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def urban1k(root: Path) -> dict[str, list[str]]:
    for number, text in ((1, "The first line.\nAnother."), (2, "Two."), (10, "Ten")):
        picture(root / f"Urban1k/image/{number}.jpg", number)
        save(root / f"Urban1k/caption/{number}.txt", text)
        save(root / f"Urban1k/caption/._{number}.txt", "left by a Mac")
    return {"1": ["The first line."], "2": ["Two."], "10": ["Ten"]}


def _sharegpt4v(root: Path, entries: int) -> None:
    for number in range(4):
        picture(root / f"sam/images/sa_{number}.jpg", number)
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": LONG}]
    rows = [{"id": "x", "image": f"sam/images/sa_{n}.jpg", "conversations": said} for n in range(entries)]
    save(root / "share-captioner_coco_lcs_sam_1246k_1107.json", rows)


def sharegpt4v_1k(root: Path) -> dict[str, list[str]]:
    _sharegpt4v(root, 3)
    return {f"sam_images_sa_{number}": [LONG] for number in range(3)}


def sharegpt4v_10k(root: Path) -> dict[str, list[str]]:
    _sharegpt4v(root, 3)
    return {f"sam_images_sa_{number}": [REJOINED] for number in range(3)}


def _dci(root: Path, inner: str) -> None:
    base = root / "densely_captioned_images"
    for number, extra in ((1, LONG), (2, "Extra."), (3, "")):
        picture(base / f"photos/sa_{number}.jpg", number)
        summaries = {"base": ["Short.", "Other."], "3": "Of a mask."}
        fields = {"short_caption": "A car.", "extra_caption": extra, "summaries": summaries}
        save(base / inner / f"{number}.json", {"image": f"sa_{number}.jpg", "mask_data": {}, **fields})
    save(base / "splits.json", {"train": ["1.json"], "test": ["2.json", "3.json"]})


def dci(root: Path) -> dict[str, list[str]]:
    _dci(root, "annotations")
    return {"sa_1": [f"A car. {REJOINED}"], "sa_2": ["A car. Extra"], "sa_3": ["A car"]}


def dci_extra(root: Path) -> dict[str, list[str]]:
    _dci(root, "annotations")
    return {"sa_1": [LONG], "sa_2": ["Extra."]}


def dci_lower(root: Path) -> dict[str, list[str]]:
    _dci(root, "annotations")
    return {"sa_1": [LONG.lower()], "sa_2": ["extra."]}


def dci_summaries(root: Path) -> dict[str, list[str]]:
    _dci(root, "complete")
    return {"sa_2": ["Short.", "Other."], "sa_3": ["Short.", "Other."]}


def long_dci(root: Path) -> dict[str, list[str]]:
    picture(root / "sa_1.jpg")
    picture(root / "photos/sa_2.jpg", 2)
    save(root / "dci_long.csv", f'filepath\ttitle\nsa_1.jpg\t"{LONG}"\nsa_2.jpg\tTwo, three\n')
    return {"sa_1": [LONG], "sa_2": ["Two, three"]}


def docci(root: Path) -> dict[str, list[str]]:
    rows = []
    for number, split in enumerate(("train", "test", "test")):
        name = f"{split}_{number:05d}"
        rows.append({"example_id": name, "split": split, "image_file": f"{name}.jpg", "description": LONG})
        if split == "test":
            picture(root / f"images/{name}.jpg", number)
    save(root / "docci_descriptions.jsonlines", "\n".join(map(json.dumps, rows)))
    return {"test_00001": [LONG], "test_00002": [LONG]}


def iiw(root: Path) -> dict[str, list[str]]:
    rows = {
        "IIW-400": {"image/key": "aar_test_1", "IIW": LONG},
        "DCI_Test": {"image": "sa_5.jpg", "IIW": "Five."},
        "DOCCI_Test": {"image": "test_7", "IIW": "Seven."},
        "LocNar_Eval": {"image/key": "abc", "IIW-P5B": "A model's."},
    }
    for name, row in rows.items():
        save(root / "datasets" / name / "data.jsonl", json.dumps(row) + "\n")
    for name in ("docci_aar/aar_test_1", "dci/sa_5", "docci/test_7"):
        picture(root / f"{name}.jpg")
    return {"aar_test_1": [LONG], "sa_5": ["Five."], "test_7": ["Seven."]}


def coco_karpathy5k(root: Path) -> dict[str, list[str]]:
    images = []
    for number, split in enumerate(("restval", "test", "test")):
        name = f"COCO_val2014_{number:012d}"
        sentences = [{"raw": f"Caption {n}."} for n in range(5 + number)]
        images.append(
            {"filename": f"{name}.jpg", "filepath": "val2014", "split": split, "sentences": sentences}
        )
        if split == "test":
            picture(root / f"val2014/{name}.jpg", number)
    save(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return {f"COCO_val2014_{n:012d}": [f"Caption {k}." for k in range(5 + n)] for n in (1, 2)}


def coco_val2017(root: Path) -> dict[str, list[str]]:
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (139, 7)]
    said = [{"image_id": n, "id": k, "caption": f"{n} {k}"} for k in range(5) for n in (7, 139)]
    for number in (7, 139):
        picture(root / f"val2017/{number:012d}.jpg", number)
    save(root / "annotations/captions_val2017.json", {"info": {}, "images": images, "annotations": said})
    return {f"{n:012d}": [f"{n} {k}" for k in range(5)] for n in (139, 7)}


def flickr30k_1k(root: Path) -> dict[str, list[str]]:
    sentences = [{"raw": f"Caption {n}."} for n in range(5)]
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": sentences}
        for name, split in (("1007129816", "test"), ("1", "train"))
    ]
    save(root / "dataset_flickr30k.json", {"images": images})
    picture(root / "flickr30k-images/1007129816.jpg")
    return {"1007129816": [f"Caption {n}." for n in range(5)]}


def flickr30k_full(root: Path) -> dict[str, list[str]]:
    lines = [f"{name}.jpg#{n}\tCaption {n}, of {name} .\n" for name in ("36979", "1000") for n in range(5)]
    save(root / "results_20130124.token", "".join(lines))
    for name in ("36979", "1000"):
        picture(root / f"flickr30k-images/{name}.jpg")
    return {name: [f"Caption {n}, of {name} ." for n in range(5)] for name in ("36979", "1000")}


def jsonl(root: Path) -> dict[str, list[str]]:
    rows = [{"image": f"images/{n}.jpg", "captions": [LONG, f"Image {n}."]} for n in range(3)]
    save(root / "captions.jsonl", "\n".join(map(json.dumps, rows)))
    for number in range(3):
        picture(root / f"images/{number}.jpg", number)
    return {str(number): [LONG, f"Image {number}."] for number in range(3)}


_ALL = (
    urban1k,
    sharegpt4v_1k,
    sharegpt4v_10k,
    dci,
    dci_extra,
    dci_lower,
    dci_summaries,
    long_dci,
    docci,
    iiw,
)
_ALL += (iiw, coco_karpathy5k, coco_val2017, flickr30k_1k, flickr30k_full, jsonl)
BUILDERS: dict[str, Callable[[Path], dict[str, list[str]]]] = {one.__name__: one for one in _ALL}
