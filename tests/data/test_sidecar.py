"""Side-cars: facts joined by key, from every kind of table; what is kept, weighed and shown by them."""

import csv
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest

from longclip import cli
from longclip.captions import First, Groups, Sentences, Whole, parse
from longclip.data.faults import Damaged
from longclip.data.sidecars.clusters import cluster
from longclip.data.sidecars.joining import Join, Joined, listed
from longclip.data.sidecars.store import Store, digests, find, label_of
from longclip.data.sidecars.writer import write_sidecar
from longclip.data.tars.dataset import Dataset
from longclip.data.tars.shards import write
from longclip.tokens import Tokenizer
from longclip.types import Ids, Record, UserError

COUNT = 40
TEXT = "A red ball lies here. It is round."
ROWS: list[dict[str, Any]] = [
    {
        "key": f"k{n}",
        "score": n / 10,
        "cluster": n % 3,
        "teacher": [n, 0.5, -n],
        "vecap": f"Scene {n}. {TEXT}",
    }
    for n in range(COUNT - 4)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Dataset:
    def records() -> Iterable[Record]:
        for n in range(COUNT):
            captions = tuple(parse(f"Number {n}, {word}.", "raw", tokenizer) for word in ("one", "two"))
            yield Record(f"k{n}", b"image", "jpg", captions, {"uid": f"{n:032x}", "size": n})

    folder = tmp_path_factory.mktemp("data") / "train"
    write(records(), folder, samples_per_shard=16, tokenizer_hash=tokenizer.name_hash)
    return Dataset(folder, tokenizer)


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as the file's name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".npz":
        np.savez(path, **{name: np.array([row[name] for row in rows]) for name in rows[0]})
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def store(folder: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]] = ROWS, **options: Any) -> str:
    write_sidecar(table(folder / "facts.jsonl", rows), folder / "store", tokenizer, **options)
    return str(folder / "store")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "npz", "parquet"])
def test_a_table_of_any_kind_comes_back_by_key(
    kind: str, tmp_path: Path, data: Dataset, tokenizer: Tokenizer
) -> None:
    report = write_sidecar(table(tmp_path / f"facts.{kind}", ROWS[::-1]), tmp_path / "out", tokenizer)
    assert report.rows == len(ROWS)
    found = Store(tmp_path / "out")
    rows = found.rows(digests(data.keys()))
    assert (rows >= 0).tolist() == [n < len(ROWS) for n in range(COUNT)]
    scores, clusters = found.values("score", rows), found.values("cluster", rows)
    for n, row in enumerate(ROWS):
        assert scores[n] == row["score"]
        assert clusters[n] == row["cluster"]
        (caption,) = found.captions("vecap", int(rows[n]), tokenizer)
        assert caption == parse(row["vecap"], "vecap", tokenizer)
        assert found.vector("teacher", int(rows[n])).tolist() == row["teacher"]
    assert np.isnan(scores[-4:]).all()
    assert found.captions("vecap", -1, tokenizer) == []


def test_missing_cells_are_counted_and_stay_missing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"key": "a", "x": None, "t": "A cat.", "v": [1.0]},
        {"key": "b", "x": 2.5, "v": None},
        {"key": "c"},
    ]
    report = write_sidecar(table(tmp_path / "f.jsonl", rows), tmp_path / "out", tokenizer)
    assert report.kinds == {"x": "number", "t": "captions", "v": "vector"}
    assert report.missing == {"x": 2, "t": 2, "v": 2}
    found = Store(tmp_path / "out")
    places = found.rows(digests(["a", "b", "c", "d"]))
    assert np.nan_to_num(found.values("x", places), nan=-9).tolist() == [-9, 2.5, -9, -9]
    assert [len(found.captions("t", int(row), tokenizer)) for row in places] == [1, 0, 0, 0]


def test_captions_made_by_several_processes_are_those_of_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = table(tmp_path / "facts.jsonl", ROWS)
    for processes in (1, 2):
        write_sidecar(source, tmp_path / str(processes), tokenizer, processes=processes)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_another_tokenizer_makes_the_ids_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Other(Tokenizer):
        name_hash = "other"  # type: ignore[assignment]

        def ids(self, cleaned: str) -> Ids:
            return array("H", [len(cleaned)])

    found = Store(store(tmp_path, tokenizer))
    (caption,) = found.captions("vecap", 0, Other(open_clip.get_tokenizer("ViT-B-16"), 77))
    assert all(s.ids.tolist() == [s.end - s.start] for s in caption.sentences)


def test_sentences_of_which_another_tokenizer_leaves_nothing_are_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """CLIP reads "!!!" as a token, SigLIP's cleaning takes punctuation away; scores keep their captions."""
    other = Tokenizer(open_clip.tokenizer.SimpleTokenizer(clean="canonicalize"), 77)
    texts = ["...", "!!! A dog runs.", "A cat sits."]
    captions = tuple(parse(text, "raw", tokenizer) for text in texts)
    alone = Record("k1", b"image", "jpg", captions[:1])
    records = [Record("k0", b"image", "jpg", captions), alone]
    write(records, tmp_path / "train", tokenizer_hash=tokenizer.name_hash)
    rows = [{"key": "k0", "scores": [0.1, 0.2, 0.3], "more": texts}]
    data = Dataset(tmp_path / "train", other)
    joined = Joined(data, Join([store(tmp_path, tokenizer, rows)], scores="scores")).record(0)
    assert [c.score for c in joined.captions[:3]] == [pytest.approx(score) for score in (0.1, 0.2, 0.3)]
    said = [[c.text[s.start : s.end] for s in c.sentences] for c in joined.captions]
    assert said == [[], ["A dog runs."], ["A cat sits."], ["A dog runs."], ["A cat sits."]]
    slots = {"first": First(), "whole": Whole(), "sub": Sentences(3)}
    shown = Groups(slots, seed=0).show(joined.captions, "k0", 0)
    assert [text is not None for text in shown] == [True, True, True, True, False]
    with pytest.raises(Damaged, match="no captions"):
        data.record(1)


def test_a_hash_that_merely_collides_is_a_missing_key() -> None:
    known = np.array([[1, 5], [7, 5], [9, 9]], np.uint64)
    wanted = np.array([[7, 5], [7, 6], [9, 9], [8, 8], [99, 1]], np.uint64)
    assert find(known, wanted).tolist() == [1, -1, 2, -1, -1]
    assert find(known[:0], wanted).tolist() == [-1] * 5


# ---------------------------------------------------------------- joined to a dataset


def test_records_gain_captions_and_scores_and_batches_gain_columns(
    tmp_path: Path, data: Dataset, tokenizer: Tokenizer
) -> None:
    rows = [row | {"clip": [0.1, 0.3] if n else [0.2]} for n, row in enumerate(ROWS)]
    join = Join([store(tmp_path, tokenizer, rows)], scores="clip", columns=["teacher", "score"])
    joined = Joined(data, join)
    assert joined.joined == {join.stores[0]: 0.9}
    record = joined.record(5)
    assert [(c.source, c.score) for c in record.captions] == [
        ("raw", pytest.approx(0.1)), ("raw", pytest.approx(0.3)), ("vecap", None)
    ]  # fmt: skip
    assert [c.score for c in joined.record(0).captions] == [pytest.approx(0.2), None, None]
    assert joined.record(COUNT - 1) == data.record(COUNT - 1)
    assert joined.columns(5)["teacher"].tolist() == [5, 0.5, -5]
    assert joined.columns(5)["score"].shape == ()
    assert joined.columns(COUNT - 1)["teacher"].isnan().tolist() == [True] * 3


def kept(data: Dataset, tmp_path: Path, tokenizer: Tokenizer, **rules: Any) -> list[int]:
    found = Joined(data, Join([store(tmp_path, tokenizer)], filter=rules))
    return list(range(COUNT)) if found.kept is None else found.kept.tolist()


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"score": {"at_least": 3.0}}, range(30, 36)),
        ({"score": {"at_least": 1.0, "at_most": 1.25}}, range(10, 13)),
        ({"score": {"top": 0.25}}, range(27, 36)),
        ({"score": {"bottom": 0.01}}, range(1)),
        ({"score": {"top": 1.0}}, range(36)),
        ({"score": {"at_least": 3.0}, "cluster": {"at_most": 0}}, [30, 33]),
    ],
)
def test_filters_keep_what_they_say_and_nothing_without_a_value(
    rules: Any, expected: Any, tmp_path: Path, data: Dataset, tokenizer: Tokenizer
) -> None:
    assert kept(data, tmp_path, tokenizer, **rules) == list(expected)


def test_ties_at_a_quantile_do_not_keep_more(tmp_path: Path, data: Dataset, tokenizer: Tokenizer) -> None:
    rows = [{"key": f"k{n}", "score": 1.0} for n in range(COUNT)]
    found = Joined(data, Join([store(tmp_path, tokenizer, rows)], filter={"score": {"top": 0.5}}))
    assert found.choices == COUNT / 2


def test_subset_lists_of_keys_and_of_datacomps_uids(
    tmp_path: Path, data: Dataset, tokenizer: Tokenizer
) -> None:
    (tmp_path / "keys.txt").write_text("k3\nk1\n\nnobody\n")
    np.save(tmp_path / "keys.npy", np.array(["k3", "k1"]))
    for name in ("keys.txt", "keys.npy"):
        joined = Joined(data, Join(filter={"key": {"in": str(tmp_path / name)}}))
        assert joined.kept is not None
        assert joined.kept.tolist() == [1, 3]
    np.save(tmp_path / "uids.npy", np.array([(0, 7), (0, 2**63)], "u8,u8"))
    assert list(listed(tmp_path / "uids.npy")) == [f"{7:032x}", f"{2**63:032x}"]
    write_sidecar(Path(data.url), tmp_path / "meta", tokenizer)  # the shards' own meta
    joined = Joined(data, Join([str(tmp_path / "meta")], filter={"uid": {"in": str(tmp_path / "uids.npy")}}))
    assert joined.kept is not None
    assert joined.kept.tolist() == [7]
    assert joined.numbers("size").tolist() == list(range(COUNT))


def test_a_list_names_labels_and_numbers(tmp_path: Path, data: Dataset, tokenizer: Tokenizer) -> None:
    rows = [
        {"key": f"k{n}", "number": n % 3, "share": n / 10, "word": f"w{n % 3}", "v": [n % 3 + 1.0, 1.0]}
        for n in range(COUNT)
    ]
    found = [store(tmp_path, tokenizer, rows, labels=["word"]), str(tmp_path / "clusters")]
    cluster(Path(found[0]), "v", Path(found[1]), count=3)
    labels = Joined(data, Join(found)).labels("cluster")
    lists = {"number": ["1", "2"], "share": ["0.1", "0.2", "9"], "word": ["w1", "w2"], "cluster": labels[1:3]}
    for column, wanted in lists.items():
        (tmp_path / "want.txt").write_text("\n".join(map(str, wanted)))
        joined = Joined(data, Join(found, filter={column: {"in": str(tmp_path / "want.txt")}}))
        assert joined.kept is not None
        assert joined.kept.tolist() == [1, 2] if column == "share" else [n for n in range(COUNT) if n % 3]
    (tmp_path / "want.txt").write_text("1\nw1\n")
    with pytest.raises(UserError, match=r"lists what is no number .*'w1'.*column 'number' holds numbers"):
        Joined(data, Join(found, filter={"number": {"in": str(tmp_path / "want.txt")}}))


def test_weights_leave_out_what_has_none(tmp_path: Path, data: Dataset, tokenizer: Tokenizer) -> None:
    joined = Joined(data, Join([store(tmp_path, tokenizer)], weight="score"))
    assert joined.choices == 35  # k0 weighs nothing, four have no row
    assert joined.shares is not None
    assert np.diff(joined.shares.sums) == pytest.approx(np.arange(1, 36) / np.mean(np.arange(1, 36)))


def test_labels_are_whole_numbers_or_words(tmp_path: Path, data: Dataset, tokenizer: Tokenizer) -> None:
    rows = [{"key": f"k{n}", "kind": "cat" if n % 2 else "dog"} for n in range(30)]
    joined = Joined(data, Join([store(tmp_path, tokenizer, rows, labels=["kind"])]))
    dog, cat = label_of(digests(["dog", "cat"])).tolist()
    assert Counter(joined.labels("kind").tolist()) == {dog: 15, cat: 15, -1: 10}
    (tmp_path / "b").mkdir()
    numbers = Joined(data, Join([store(tmp_path / "b", tokenizer)]))
    assert numbers.labels("cluster").tolist() == [n % 3 for n in range(36)] + [-1] * 4
    with pytest.raises(UserError, match=r"'score' of .* holds numbers that are no labels"):
        numbers.labels("score")


def test_near_neighbours_become_groups(tmp_path: Path, data: Dataset, tokenizer: Tokenizer) -> None:
    """Every sample in one group, and only with one that lists it or that it lists, through the founder."""
    near = {n: [f"k{(n + step) % COUNT}" for step in (1, 2, 3)] for n in range(COUNT)}
    rows = [{"key": f"k{n}", "near": [*near[n], "nobody"] if n else None} for n in range(COUNT)]
    joined = Joined(data, Join([store(tmp_path, tokenizer, rows, neighbours=["near"])]))
    groups = joined.labels("near")
    assert (groups >= 0).all()
    keys_of_rows = np.argsort(joined.rows[0])
    for label, size in Counter(groups.tolist()).items():
        members = {f"k{n}" for n in np.flatnonzero(groups == label)}
        founder = int(keys_of_rows[label])
        assert members <= {f"k{founder}", *near[founder]}
        assert size <= 4
    assert max(Counter(groups.tolist()).values()) == 4


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ({"filter": {"score": {"at_least": 99}}}, r"at_least: 99.* keeps none of the 40 .*0 to 3.5, 4 have"),
        ({"filter": {"quality": {"top": 0.5}}}, r"no column 'quality' of kind number; they have score"),
        ({"filter": {"vecap": {"top": 0.5}}}, r"no column 'vecap' of kind number"),
        ({"filter": {"score": {"top": 50}}}, r"top: 50\}; it is a share"),
        ({"filter": {"score": {"above": 0.5}}}, r"write score: \{RULE: VALUE\} with a rule of at_least"),
        ({"filter": {"score": 0.5}}, r"has score: 0.5; write"),
        ({"filter": {"score": {"top": "30%"}}}, r"has score: \{top: '30%'\}; it is a plain number"),
        ({"filter": {"score": {"at_least": "0.3.1"}}}, r"'0.3.1'\}; it is a plain number, such as 0.3"),
        ({"filter": {"key": {"in": 3}}}, r"has key: \{in: 3\}; it is the path of a file"),
        ({"filter": {"key": {"in": "/nowhere.txt"}}}, r"/nowhere.txt cannot be read as a list"),
        ({"weight": "teacher"}, r"no column 'teacher' of kind number"),
        ({"columns": ["vecap"]}, r"no column 'vecap' of kind number or vector"),
        ({"columns": "score"}, r"columns is one text; write it as a list: \[score\]"),
        ({"stores": ["/nowhere"]}, r"/nowhere is no side-car .* longclip sidecar SRC --out /nowhere"),
    ],
)  # fmt: skip
def test_a_join_that_cannot_be_is_one_sentence(
    join: Any, message: str, tmp_path: Path, data: Dataset, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Joined(data, Join(**{"stores": [store(tmp_path, tokenizer)]} | join))
    assert "\n" not in str(caught.value)


def test_a_side_car_of_other_keys_is_refused(tmp_path: Path, data: Dataset, tokenizer: Tokenizer) -> None:
    rows = [{"key": f"0{n}", "score": n} for n in range(5)]
    with pytest.raises(UserError, match=r"none of the keys of .*such as '00', the data 'k0'.*--key COLUMN"):
        Joined(data, Join([store(tmp_path, tokenizer, rows)]))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"facts.jsonl has no rows"),
        ([{"key": "a"}], {}, r"no column beside its key 'key'"),
        ([{"name": "a", "x": 1}], {}, r"row 1 of facts.jsonl has None for its key 'key'.*--key name\|x"),
        ([{"key": key, "x": 1} for key in "aba"], {}, r"rows 1 and 3 of .* one key"),
        ([{"key": "a", "x": 1}], {"columns": ["y"]}, r"no column y; it has key, x"),
        ([{"key": "a", "../x": 1}], {}, r"'\.\./x' of .* cannot name a file"),
        ([{"key": "a", "t": list("A cat.")}], {}, r"single letters"),
        ([{"key": "a", "t": ["A cat.", 3]}], {}, r"row 1 .* in column 't', which is of kind captions"),
        ([{"key": n, "x": n if n < 1000 else "?"} for n in range(1001)], {}, r"row 1001 .* '\?' in column"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_one_sentence_and_leaves_no_store(
    rows: Any, options: Any, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match=message):
        store(tmp_path, tokenizer, rows, **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sidecar.json", b"{}"),
        ("sidecar.json", b'{"version": 1, "columns": {"../../etc/passwd": "vector"}}'),
        ("keys.npy", b"\x80\x04]q."),  # a pickle
        ("score.npy", b""),
        ("vecap.bin", b"short"),
    ],
)
def test_a_torn_or_forged_store_is_one_sentence(
    name: str, content: bytes, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = Path(store(tmp_path, tokenizer))
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*make it again"):
        Store(folder)


@pytest.mark.parametrize(
    "row", [b"[[1,[],[],null]]", b'[["a",[[0,1]],[1],"x"]]', b"{", b'[["a",[[0,1]],[1],1]]\0\xff\xff']
)
def test_a_forged_row_of_captions_is_one_sentence(row: bytes, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = Path(store(tmp_path, tokenizer))
    blob = folder / "vecap.bin"
    start, stop = np.load(folder / "vecap.spans.npy")[3].tolist()
    whole = blob.read_bytes()
    blob.write_bytes(
        whole[:start] + row.ljust(stop - start, b"\xff" if b"\0" in row else b" ") + whole[stop:]
    )
    with pytest.raises(UserError, match=r"row 3 of .*vecap.bin is damaged .*make it again"):
        Store(folder).captions("vecap", 3, tokenizer)


def test_pickled_objects_in_a_table_are_not_loaded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    np.savez(tmp_path / "a.npz", key=np.array(["a", None], dtype=object))
    with pytest.raises(UserError, match=r"a.npz holds no plain arrays"):
        write_sidecar(tmp_path / "a.npz", tmp_path / "out", tokenizer)


def test_the_command_says_what_it_wrote_and_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = table(tmp_path / "facts.jsonl", ROWS), tmp_path / "out"
    assert cli.main(["sidecar", str(source), "--out", str(out), "--columns", "score", "vecap"]) == 0
    printed = capsys.readouterr().out
    assert "36 rows" in printed
    assert "vecap: captions, 0 rows without" in printed
    assert "training shows the texts of vecap as captions; where they are none" in printed
    assert "--labels vecap, or with --columns" in printed
    assert f"data.sidecar.stores=[{out}]" in printed
    assert cli.main(["sidecar", str(source), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
