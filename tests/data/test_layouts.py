"""Every layout reads what its data set looks like; a new one is a YAML; no name leads out of the source."""

import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from sources import IMAGES, KEPT, TEXTS, save_images, save_lines, save_table, save_tar, webdataset

from longclip.data.converting.layouts import Entry, Fault, Source, load, shipped
from longclip.data.converting.layouts.fields import find
from longclip.data.converting.layouts.files import Place
from longclip.data.converting.layouts.rows import Row, reader
from longclip.data.converting.layouts.source import key_of
from longclip.data.tars.encoding import LONGEST_KEY
from longclip.types import UserError

NAMES = [f"{number}.jpg" for number in range(8)]


def texts(number: int) -> list[str]:
    value = TEXTS[number]
    return value if isinstance(value, list) else [value or ""]


def read(source: Path | str, layout: str, **options: object) -> list[Entry | Fault]:
    return list(Source(source, load(layout), **options))  # type: ignore[arg-type]


def entries(source: Path | str, layout: str, **options: object) -> list[Entry]:
    found = read(source, layout, **options)
    assert all(isinstance(entry, Entry) for entry in found), found
    return found  # type: ignore[return-value]


def image(entry: Entry) -> bytes:
    return entry.image.read() if isinstance(entry.image, Place) else entry.image


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install 'longclip[parquet]'")
    from pyarrow import parquet as writer

    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


# One data set each, as published: a folder, and the captions by source that are expected of sample 0 and 2.


def jsonl(folder: Path) -> None:
    save_images(folder / "images", NAMES)
    rows = [{"image": f"images/{n}", "captions": texts(i)} for i, n in enumerate(NAMES)]
    save_lines(folder / "captions.jsonl", rows)


def table(folder: Path, suffix: str = ".csv") -> None:
    save_images(folder, NAMES)
    rows = [{"image": n, "caption": TEXTS[i], "licence": "CC0"} for i, n in enumerate(NAMES)]
    save_table(folder / f"mine{suffix}", rows)


def open_clip_csv(folder: Path) -> None:
    save_images(folder, NAMES)
    lines = [f"{n}\t{(TEXTS[i] or '')!s}".replace("\n", " ") for i, n in enumerate(NAMES)]
    (folder / "cc.csv").write_text("\n".join(["filepath\ttitle", *lines]))


def table_parquet(folder: Path) -> None:
    save_images(folder, NAMES)
    parquet(folder / "mine.parquet", [{"path": n, "text": texts(i)} for i, n in enumerate(NAMES)])


def loose(folder: Path) -> None:
    save_images(folder / "sub", NAMES)
    for number in range(8):
        (folder / "sub" / f"{number}.txt").write_text("\n".join(texts(number)), "utf-8")


def img2dataset(folder: Path) -> None:
    folder.mkdir()
    webdataset(folder / "00000.tar", [{"caption": "\n".join(texts(i)), "url": "u"} for i in range(8)])


def img2dataset_files(folder: Path) -> None:
    save_images(folder / "00000", NAMES)
    for number in range(8):
        (folder / "00000" / f"{number}.json").write_text(json.dumps({"caption": "\n".join(texts(number))}))
    (folder / "00000_stats.json").write_text('{"successes": 8}')


def sharegpt4v(folder: Path) -> None:
    save_images(folder, [f"coco/train2017/{n}" for n in NAMES])
    rows = [
        {
            "id": "x",
            "image": f"coco/train2017/{name}",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                *({"from": "gpt", "value": text} for text in texts(number)),
            ],
        }
        for number, name in enumerate(NAMES)
    ]
    (folder / "share-captioner_coco_lcs_sam_1246k_1107.json").write_text(json.dumps(rows, indent=1))


SIX = [f"{size}{model}" for model in ("IB", "SV", "LLA") for size in ("short", "long")]


def recaptions(number: int, value: object) -> dict[str, object]:
    return {"raw_caption": value} | {f"{source}_captions": value for source in SIX}


def dreamlip_csv(folder: Path) -> None:
    save_images(folder, NAMES)
    rows = [{"Image Path": n, **recaptions(i, TEXTS[i])} for i, n in enumerate(NAMES)]
    save_table(folder / "cc3m_3long_3short_1raw_captions.csv", rows)


def dreamlip_json(folder: Path) -> None:
    save_images(folder, NAMES)
    for number, name in enumerate(NAMES):
        row = {"ImagePath": name, **recaptions(number, TEXTS[number])}
        (folder / f"{number}.json").write_text(json.dumps(row))


def dreamlip_tar(folder: Path) -> None:
    folder.mkdir()
    rows = [{"caption": TEXTS[i], **recaptions(i, TEXTS[i]), "url": "u"} for i in range(8)]
    for row in rows:
        del row["raw_caption"]  # img2dataset calls the column of --caption_col so
    webdataset(folder / "00000.tar", rows)


def flair(folder: Path) -> None:
    folder.mkdir()
    webdataset(folder / "00000.tar", [recaptions(i, texts(i)) for i in range(8)])


def recap_datacomp(folder: Path) -> None:
    folder.mkdir()
    rows = [{"url": "u", "org_caption": "alt", "caption": "\n".join(texts(i))} for i in range(8)]
    webdataset(folder / "00000.tar", rows)


def pixelprose(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"uid": str(i), "original_caption": "alt", "vlm_caption": f" This image displays: {texts(i)[0]}"}
        for i in range(8)
    ]
    webdataset(folder / "00000.tar", rows)


def capsfusion(folder: Path) -> None:
    folder.mkdir()
    rows = [{"laion_2b": "alt", "laion_coco": "blip", "capsfusion": texts(i)[0]} for i in range(8)]
    webdataset(folder / "00000.tar", rows)


def docci(folder: Path) -> None:
    save_images(folder / "images", NAMES)
    rows = [
        {"example_id": f"docci_{i}", "split": "test", "image_file": n, "description": "\n".join(texts(i))}
        for i, n in enumerate(NAMES)
    ]
    save_lines(folder / "docci_descriptions.jsonlines", rows)


def dci(folder: Path) -> None:
    save_images(folder / "photos", NAMES)
    (folder / "annotations").mkdir()
    for number, name in enumerate(NAMES):
        caption = {
            "short_caption": "Short.",
            "extra_caption": "\n".join(texts(number)),
            "mask_data": {"1": 2},
        }
        (folder / "annotations" / f"{number}.json").write_text(json.dumps({"image": name, **caption}))
    (folder / "splits.json").write_text(
        json.dumps({"train": [f"{n}.json" for n in range(7)], "test": ["7.json"]})
    )


def iiw(folder: Path) -> None:
    save_images(folder / "docci", NAMES)
    rows = [{"image/key": str(i), "IIW": "\n".join(texts(i)), "IIW-P5B": "Machine."} for i in range(8)]
    save_lines(folder / "IIW-400" / "data.jsonl", rows)
    save_images(folder / "IIW-400" / "docci", NAMES)


def densefusion(folder: Path) -> None:
    save_images(folder, NAMES)
    rows = [{"image_id": str(i), "url": "u", "caption": "\n".join(texts(i))} for i in range(8)]
    save_lines(folder / "DenseFusion-1M.jsonl", rows)


TWO = ["Two cats sleep.", "They are white."]
DOG = "A dog runs. It is brown."
LISTS = {"raw": TWO, **dict.fromkeys(SIX, TWO)}
SENTENCES = {source: ["\n".join(TWO)] for source in LISTS}

CASES: list[tuple[str, Callable[[Path], None], dict[str, list[str]], dict[str, list[str]]]] = [
    ("jsonl", jsonl, {"caption": [DOG]}, {"caption": TWO}),
    ("csv", table, {"caption": [DOG]}, {"caption": TWO}),
    ("csv", lambda folder: table(folder, ".tsv"), {"caption": [DOG]}, {"caption": TWO}),
    ("csv", open_clip_csv, {"caption": [DOG]}, {"caption": TWO}),
    ("csv", table_parquet, {"caption": [DOG]}, {"caption": TWO}),
    ("folder", loose, {"caption": [DOG]}, {"caption": ["\n".join(TWO)]}),
    ("img2dataset", img2dataset, {"caption": [DOG]}, {"caption": ["\n".join(TWO)]}),
    ("img2dataset", img2dataset_files, {"caption": [DOG]}, {"caption": ["\n".join(TWO)]}),
    ("sharegpt4v", sharegpt4v, {"sharegpt4v": [DOG]}, {"sharegpt4v": TWO}),
    ("dreamlip", dreamlip_csv, {source: [DOG] for source in LISTS}, LISTS),
    ("dreamlip", dreamlip_json, {source: [DOG] for source in LISTS}, LISTS),
    ("dreamlip", dreamlip_tar, {source: [DOG] for source in LISTS}, LISTS),
    ("flair", flair, {source: [DOG] for source in LISTS}, SENTENCES),
    (
        "recap_datacomp",
        recap_datacomp,
        {"raw": ["alt"], "recap": [DOG]},
        {"raw": ["alt"], "recap": ["\n".join(TWO)]},
    ),
    ("pixelprose", pixelprose, {"raw": ["alt"], "vlm": [DOG]}, {"raw": ["alt"], "vlm": [TWO[0]]}),
    (
        "capsfusion",
        capsfusion,
        {"raw": ["alt"], "coco": ["blip"], "capsfusion": [DOG]},
        {"raw": ["alt"], "coco": ["blip"], "capsfusion": [TWO[0]]},
    ),
    ("docci", docci, {"docci": [DOG]}, {"docci": ["\n".join(TWO)]}),
    (
        "dci",
        dci,
        {"full": [f"Short.\n{DOG}"], "extra": [DOG]},
        {"full": ["Short.\n" + "\n".join(TWO)], "extra": ["\n".join(TWO)]},
    ),
    ("iiw", iiw, {"iiw": [DOG], "p5b": ["Machine."]}, {"iiw": ["\n".join(TWO)], "p5b": ["Machine."]}),
    ("densefusion", densefusion, {"dense": [DOG]}, {"dense": ["\n".join(TWO)]}),
]


def by_source(entry: Entry) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for source, text in entry.captions:
        found.setdefault(source, []).append(text)
    return found


@pytest.mark.parametrize(
    ("layout", "make", "plain", "listed"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_a_layout_reads_its_data_set(
    tmp_path: Path, layout: str, make: Callable[[Path], None], plain: object, listed: object
) -> None:
    make(tmp_path / "set")
    found = entries(tmp_path / "set", layout)
    assert [entry.number for entry in found] == list(range(1, 9))
    assert [image(entry) for entry in found] == IMAGES
    assert len({entry.key for entry in found}) == 8
    assert by_source(found[0]) == plain
    assert by_source(found[2]) == listed
    last = next(text for source, text in found[7].captions if source not in ("raw", "coco", "p5b"))
    assert last.removeprefix("Short.\n") == TEXTS[7]


def test_every_shipped_layout_is_read_above_and_says_what_it_is() -> None:
    assert {layout for layout, *_ in CASES} == set(shipped())
    for name, path in shipped().items():
        assert load(name).about
        assert path.read_text().startswith("# ")


def test_splits_come_from_a_field_a_file_or_the_first_entries(tmp_path: Path) -> None:
    docci(tmp_path / "docci")
    assert {entry.split for entry in entries(tmp_path / "docci", "docci")} == {"test"}
    dci(tmp_path / "dci")
    assert [entry.split for entry in entries(tmp_path / "dci", "dci")] == ["train"] * 7 + ["test"]
    sharegpt4v(tmp_path / "sv")
    assert {entry.split for entry in entries(tmp_path / "sv", "sharegpt4v")} == {"test"}
    some = Source(tmp_path / "sv", load("sharegpt4v", held_out=3))
    assert [entry.split for entry in some if isinstance(entry, Entry)] == ["test"] * 3 + ["train"] * 5


def test_a_new_layout_is_a_new_yaml(tmp_path: Path) -> None:
    save_images(tmp_path / "pictures", NAMES)
    rows = [
        {"file": {"name": n}, "said": [{"by": "ann", "what": "A."}, {"by": "bob", "what": "B."}]}
        for n in NAMES
    ]
    save_lines(tmp_path / "data.ndjson", rows)
    (tmp_path / "mine.yaml").write_text(
        "about: mine\nfiles: ['*.ndjson']\nimage: file.name\nfolders: [pictures]\n"
        "captions: {ann: 'said[by=ann].what', second: 'said[1].what'}\nsplit: {default: dev}\n"
    )
    first = entries(tmp_path, str(tmp_path / "mine.yaml"))[0]
    assert (first.split, first.captions) == ("dev", [("ann", "A."), ("second", "B.")])


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("about: x", "has no `captions`"),
        ("captions: {a: b}", "missing 1 required positional argument: 'about'"),
        ("about: x\ncaptions: {a: b}\nimages: c", "unexpected keyword argument 'images'"),
        ("about: x\ncaptions: {a: {feild: b}}", "needs either `field` or `join`"),
        ("about: x\ncaptions: {../a: b}", "is no plain name"),
        ("about: x\ncaptions: {a: b}\nsplit: {held: 3}", "unexpected keyword argument 'held'"),
        ("about: [", "is no layout"),
    ],
)
def test_a_wrong_yaml_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "mine.yaml"))


def test_an_unknown_layout_lists_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"choose one of capsfusion, csv, dci, .*or give the path of your own YAML"
    ):
        load("nothing")


def test_a_folder_and_its_tar_hold_the_same_entries(tmp_path: Path) -> None:
    jsonl(tmp_path / "set")
    expected = [entry._replace(image=image(entry)) for entry in entries(tmp_path / "set", "jsonl")]
    members = [
        (f"set/{path.relative_to(tmp_path / 'set')}", path.read_bytes())
        for path in (tmp_path / "set").rglob("*")
        if path.is_file()
    ]
    packed = entries(save_tar(tmp_path / "set.tar", members), "jsonl")
    assert [e._replace(image=image(e), where="") for e in packed] == [e._replace(where="") for e in expected]


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    save_images(tmp_path / "elsewhere", NAMES)
    save_lines(tmp_path / "list.jsonl", [{"image": name, "captions": ["x y"]} for name in NAMES])
    assert {type(found) for found in read(tmp_path / "list.jsonl", "jsonl")} == {Fault}
    found = entries(tmp_path / "list.jsonl", "jsonl", images=tmp_path / "elsewhere")
    assert [image(entry) for entry in found] == IMAGES


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for prefix in ("b", "a"):
        webdataset(tmp_path / f"{prefix}.tar", [{"caption": "x"}] * 8, prefix)
    found = entries(str(tmp_path / "*.tar"), "img2dataset")
    assert [entry.key for entry in found] == [f"{prefix}{n:02d}" for prefix in "ab" for n in range(8)]
    assert [e.key for e in entries(tmp_path, "img2dataset")] == [e.key for e in found]


def test_web_addresses_are_answered_with_the_command_that_downloads(tmp_path: Path) -> None:
    rows = [{"Image Path": "https://example.org/1.jpg", **recaptions(0, "x")}]
    with pytest.raises(
        UserError, match=r"img2dataset --url_list .*cc3m.csv --input_format csv .*longSV_captions"
    ):
        read(save_table(tmp_path / "cc3m.csv", rows), "dreamlip")


LINE = {"image": "images/0.jpg", "captions": ["x y"]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line is no JSON"),
        ("[" * 100_000, "line is no JSON"),
        ("[1, 2]", "entry is no object"),
        ({"captions": ["x"]}, "no image named"),
        ({"image": 3, "captions": ["x"]}, "no image named"),
        ({"image": "images/gone.jpg", "captions": ["x"]}, "image is missing"),
        ({"image": "images/", "captions": ["x"]}, "image is missing"),
        ({"image": "../secret.jpg", "captions": ["x"]}, "path leads out of the source"),
        ({"image": "images/../../secret.jpg", "captions": ["x"]}, "path leads out of the source"),
        ({"image": "/etc/passwd", "captions": ["x"]}, "path leads out of the source"),
        ({"image": "a\0b", "captions": ["x"]}, "path leads out of the source"),
        ({"image": "https://example.org/1.jpg", "captions": ["x"]}, "image is a web address"),
        ({**LINE, "captions": "A dog."}, "captions are no list of texts"),
        ({**LINE, "captions": list("A dog.")}, "captions are single letters"),
        ({**LINE, "captions": [["A dog."]]}, "captions are no text"),
        ({**LINE, "captions": {"raw": 3}}, "captions are no text"),
        ({"image": "images/0.jpg"}, "no captions"),
        ({**LINE, "split": "../../etc"}, "split is no plain name"),
        ({**LINE, "split": 3}, "split is no plain name"),
        ({**LINE, "key": ["k"]}, "key is no text"),
        ({**LINE, "image": "x" * 5000}, "image is missing"),
        ({**LINE, "captions": {"\ud800": "A dog."}}, "caption source is no plain name"),
    ],
)
@pytest.mark.parametrize("tar", [False, True])
def test_a_bad_line_is_a_fault_and_the_next_is_read(
    tmp_path: Path, line: object, reason: str, tar: bool
) -> None:
    (tmp_path / "secret.jpg").write_bytes(IMAGES[0])
    save_images(tmp_path / "set" / "images", NAMES)
    lines = [json.dumps(LINE), line if isinstance(line, str) else json.dumps(line), json.dumps(LINE)]
    (tmp_path / "set" / "captions.jsonl").write_text("\n".join(lines) + "\n\n")
    source = tmp_path / "set"
    if tar:
        names = ["captions.jsonl", "images/0.jpg"]
        source = save_tar(tmp_path / "set.tar", [(n, (tmp_path / "set" / n).read_bytes()) for n in names])
    good, bad, after = read(source, "jsonl")
    assert isinstance(good, Entry)
    assert isinstance(after, Entry)
    assert isinstance(bad, Fault)
    assert (bad.reason, bad.number) == (reason, 2)
    assert "captions.jsonl:2" in bad.where


def test_links_are_followed_only_where_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(IMAGES[0])
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "in.jpg").write_bytes(IMAGES[0])
    (folder / "alias.jpg").symlink_to("in.jpg")
    save_lines(
        folder / "captions.jsonl", [{"image": f"{n}.jpg", "captions": ["x"]} for n in ("out", "alias")]
    )
    bad, good = read(folder, "jsonl")
    assert isinstance(bad, Fault)
    assert bad.reason == "link leads out of the source"
    assert isinstance(good, Entry)
    assert len(entries(folder, "jsonl", follow_links=True)) == 2


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    import tarfile

    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"a{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
    assert read(path, "img2dataset") == []


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "x.tar", [("../../etc/a.b/k.jpg", IMAGES[0]), ("../../etc/a.b/k.txt", b"x y")])
    (entry,) = entries(path, "img2dataset")
    assert not set(entry.key) & set("./\\")


def found_of(source: Path, layout: str) -> list[tuple[str, str]]:
    """(key, "") of each entry, and (reason, detail) of each fault."""
    found = read(source, layout)
    return [(f.reason, f.detail) if isinstance(f, Fault) else (f.key, "") for f in found]


def test_an_image_that_a_dot_in_its_name_hides_is_a_fault(tmp_path: Path) -> None:
    """webdataset ends a key at the first dot, so photo.0.jpg and photo.1.jpg are parts of one sample."""
    names = [
        "photo.0.jpg",
        "photo.0.txt",
        "photo.1.JPG",
        "good.jpg",
        "good.mask.png",
        "good.txt",
        "._good.jpg",
    ]
    found = found_of(save_tar(tmp_path / "x.tar", [(name, IMAGES[0]) for name in names]), "img2dataset")
    dotted = "image has a dot in its name"
    assert [first for first, _ in found] == [dotted, dotted, "good"], "a mask beside a picture is no fault"
    assert found[1][1].startswith("photo.1.JPG belongs to the key 'photo'")


def test_two_images_of_one_name_are_a_fault(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.JPG", "b.jpg", "c.jpeg"):
        (tmp_path / name).write_bytes(IMAGES[0])
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x y")
    found = found_of(tmp_path, "folder")
    assert [first for first, _ in found] == ["two images of one name"] * 2 + ["c"]
    assert found[0][1].endswith("a.jpg, a.png; rename all but one of them, or remove them")


def test_a_cut_tar_is_a_fault_and_the_next_is_read(tmp_path: Path) -> None:
    for name in ("0", "1"):
        webdataset(tmp_path / f"{name}.tar", [{"caption": "x y"}] * 8, name)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:6000])
    found = read(tmp_path, "img2dataset")
    faults = [fault.reason for fault in found if isinstance(fault, Fault)]
    assert faults == ["tar is cut off or damaged"]
    assert [entry.key for entry in found if isinstance(entry, Entry)][-8:] == [f"1{n:02d}" for n in range(8)]


def test_broken_listings_say_where(tmp_path: Path) -> None:
    save_images(tmp_path, NAMES)
    good = json.dumps([{"image": "0.jpg", "conversations": []}] * 3)
    for text, message in [
        (good[:-30], r"x.json is broken in entry 3 .*cut off"),
        (good[:-1], r"x.json has 'its end' after entry 3"),
        (good.replace("}, {", "} {", 1), "has '{' after entry 1, where a comma"),
        ('"text"', "begins with '\"'"),
    ]:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.json", "sharegpt4v")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"no whole Parquet file|needs pyarrow"):
        read(tmp_path / "x.parquet", "csv")
    (tmp_path / "x.docx").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.docx is no listing that longclip reads"):
        read(tmp_path / "x.docx", "csv")


NOISE = [
    b"null",
    b"[",
    b"{",
    b"]",
    b"-1",
    bytes(512),
    b'"',
    b"\xff\xfe",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"../",
]


@pytest.mark.parametrize("layout", ["jsonl", "sharegpt4v", "csv", "dreamlip", "dci", "img2dataset"])
def test_damage_anywhere_is_a_fault_or_a_sentence(tmp_path: Path, layout: str) -> None:
    rng = random.Random(layout)
    next(make for name, make, *_ in CASES if name == layout)(tmp_path / "set")
    listings = [p for p in sorted((tmp_path / "set").rglob("*")) if p.is_file() and p.suffix != ".jpg"]
    whole, said = {path: path.read_bytes() for path in listings}, []
    for _ in range(12):
        path = rng.choice(listings)
        at, count = rng.randrange(len(whole[path])), rng.choice([0, 0, 1, 100])
        path.write_bytes(whole[path][:at] + rng.choice([b"", *NOISE]) + whole[path][at + count :])
        try:
            for found in Source(tmp_path / "set", load(layout)):
                assert found.reason if isinstance(found, Fault) else found.key
        except UserError as error:
            said.append(str(error))
        path.write_bytes(whole[path])
    assert not any("\n" in text for text in said), "one sentence each"


def test_rows_of_another_width_are_faults(tmp_path: Path) -> None:
    save_images(tmp_path, NAMES)
    (tmp_path / "x.csv").write_text('image,caption\n0.jpg,"a\nb",c\n1.jpg,"two\nlines"\n')
    bad, good = read(tmp_path, "csv")
    assert isinstance(bad, Fault)
    assert bad.reason == "row has too many or too few cells"
    assert isinstance(good, Entry)
    assert good.captions == [("caption", "two\nlines")]


def test_images_inside_a_parquet_file_are_taken(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": IMAGES[i], "path": f"{i}.png"}, "caption": "x"} for i in KEPT]
    found = entries(parquet(tmp_path / "x.parquet", rows), "csv")  # type: ignore[arg-type]
    assert [image(entry) for entry in found] == [IMAGES[i] for i in KEPT]
    assert found[0].key == "0"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a folder"):
        Source(tmp_path / "nowhere", load("jsonl"))
    with pytest.raises(UserError, match=r"holds nothing that fits .*looked for docci_descriptions.jsonlines"):
        Source(tmp_path, load("docci"))
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b packed")
    with pytest.raises(UserError, match=r"no uncompressed tar .* gunzip"):
        read(tmp_path / "x.tar", "img2dataset")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_long_listings_are_not_held(tmp_path: Path, suffix: str) -> None:
    """The peak does not grow with the listing: four times the rows, the same memory."""

    def peak(count: int) -> int:
        rows = [json.dumps({"image": "0.jpg", "caption": "x" * 10_000})] * count
        lines = {".json": f"[{','.join(rows)}]", ".csv": "caption\n" + "\n".join(["x" * 10_000] * count)}
        (tmp_path / f"x{suffix}").write_text(lines.get(suffix, "\n".join(rows)))
        size = (tmp_path / f"x{suffix}").stat().st_size
        with (tmp_path / f"x{suffix}").open("rb") as stream:
            tracemalloc.start()
            assert sum(1 for _ in reader(suffix)(stream, size, "x")) == count
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found

    small, large = peak(400), peak(1600)
    assert large < 1.2 * small + 2**16, (small, large)


def test_meta_is_plain_and_what_the_layout_names(tmp_path: Path) -> None:
    save_images(tmp_path, NAMES)
    row = {"image": "0.jpg", "captions": ["x"], "score": float("nan"), "odd": "\ud800", "n": {"a": [1]}}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    (entry,) = entries(tmp_path, "jsonl")
    assert entry.meta == {"image": "0.jpg", "score": None, "odd": "?", "n": {"a": [1]}}


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("[0.31, -1e-3]", [0.31, -1e-3]),
        ("[]", []),
        ("['a', 'b']", ["a", "b"]),
        ("[1] a dog [2]", "[1] a dog [2]"),
        ("[A dog.]", "[A dog.]"),
        ("[2] * 9", "[2] * 9"),
    ],
)
def test_a_cell_that_is_a_list_is_read_as_one(cell: str, value: object) -> None:
    (row,) = reader("x.csv")(io.BytesIO(f'a,b\n"{cell}",\n'.encode()), 99, "x.csv")
    assert isinstance(row, Row)
    assert row.fields == {"a": value, "b": ""}


def test_paths_find_fields() -> None:
    fields = {"a": {"b": [{"c": 1, "d": 2}, {"c": 3}, "x"]}, "x.y": 5, "image/key": 6}
    assert find(fields, "a.b[1].c") == 3
    assert find(fields, "a.b.c") == [1, 3]
    assert find(fields, "a.b[c=1].d") == [2]
    assert find(fields, "x.y") == 5
    assert find(fields, "image/key") == 6
    assert find(fields, "a.z[4].q") is None
    assert find({"a": "text"}, "a[x=1].b") == []
    assert find({"a": 3}, "a[x=1].b") == []


def test_keys_are_short_plain_and_told_apart() -> None:
    assert key_of("images/1_a.jpg") == "1_a"
    assert key_of("./images/x/é 1.v2.jpeg") == "x_é_1_v2"
    assert key_of("v1.5", whole=True) == "v1_5"
    long = [key_of(f"{'d' * 200}/{number}.jpg") for number in range(2)]
    assert long[0] != long[1]
    assert all(len(key.encode()) <= LONGEST_KEY for key in long)
