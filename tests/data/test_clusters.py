"""Labels of look-alikes: the clusters that are there, those of earlier stages kept apart, and one a batch."""

import json

import numpy as np
import pytest

from longclip import cli
from longclip.data.plans.composing import Composed, Grouped
from longclip.data.plans.order import Order
from longclip.data.sidecars.clusters import centres, cluster, nearest
from longclip.data.sidecars.store import Store, digests
from longclip.types import UserError

COUNT = 60
KEYS = [f"k{n}" for n in range(COUNT)]


def table(folder, blobs, name="vectors", keys=KEYS):
    """A side-car of COUNT noisy vectors around as many directions as `blobs` has numbers; k7 has none."""
    random = np.random.default_rng(0)
    rows = [
        {"key": key, "v": (9 * np.eye(6)[b] + random.normal(size=6)).tolist()}
        for key, b in zip(keys, blobs, strict=True)
    ]
    rows[7]["v"] = None
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["sidecar", str(folder / f"{name}.jsonl"), "--out", str(folder / name)]) == 0
    return folder / name


def labels(folder):
    store = Store(folder)
    return store.values("cluster", store.rows(digests(KEYS)))


def same(one, other):
    """Whether two labellings part the samples alike, wherever both have one."""
    pairs = {(a, b) for a, b in zip(one, other, strict=True) if a >= 0}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_clusters_that_are_there_are_found_and_what_has_no_vector_has_no_label(tmp_path):
    blobs = [n % 3 for n in range(COUNT)]
    report = cluster(table(tmp_path, blobs), "v", tmp_path / "out", count=3)
    found = labels(tmp_path / "out")
    assert same(found, blobs)
    assert np.flatnonzero(found < 0).tolist() == [7]
    assert report == (COUNT, 3, 19, 20, 1)


def test_a_later_stage_parts_what_an_earlier_one_left_together(tmp_path):
    first, second = [n % 3 for n in range(COUNT)], [n // 30 for n in range(COUNT)]
    cluster(table(tmp_path, first), "v", tmp_path / "one", count=3)
    report = cluster(table(tmp_path, second, "again"), "v", tmp_path / "two", 2, [tmp_path / "one"])
    assert same(labels(tmp_path / "two"), [10 * a + b for a, b in zip(first, second, strict=True)])
    assert report.labels == 6


def test_each_vector_is_with_the_centre_that_it_is_nearest_to_and_centres_are_means():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(200, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = centres(vectors, 4)
    mine = nearest(vectors, found)
    for k in range(4):
        mean = vectors[mine == k].mean(axis=0)
        assert found[k] @ mean / np.linalg.norm(mean) > 0.99
    assert all(mine[n] == max(range(4), key=lambda k: float(vectors[n] @ found[k])) for n in range(200))


def test_twins_leave_no_centre_without_a_place():
    vectors = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    assert np.isfinite(centres(vectors, 4)).all()
    assert set(nearest(vectors, centres(vectors, 4))[:5]).isdisjoint(
        nearest(vectors, centres(vectors, 4))[5:]
    )


def test_a_batch_is_of_one_cluster(tmp_path):
    cluster(table(tmp_path, [n % 3 for n in range(COUNT)]), "v", tmp_path / "out", count=3)
    found = labels(tmp_path / "out")
    stream = Composed(Order(COUNT, 0), Grouped(found, 10, 1.0), 10, 6, 0)
    of_batches = [set(found[stream.span(n, n + 10)[:, 1]]) for n in range(0, COUNT, 10)]
    assert sum(len(seen) == 1 for seen in of_batches) == 5, "six of ten samples, one without label"


def test_the_command_says_what_to_type_next_and_mistakes_are_sentences(tmp_path, capsys):
    source = table(tmp_path, [n % 2 for n in range(COUNT)])
    assert cli.main(["cluster", str(source), "--column", "v", "--count", "2", "--out", f"{tmp_path}/c"]) == 0
    assert "2 clusters of" in (said := capsys.readouterr().out)
    assert (
        f"recipe=mcl model=vit_b16 data.sidecar.stores=[{tmp_path}/c], or data.plan.batches=cluster" in said
    )
    for arguments, words in (
        (("w", tmp_path / "d", 2), r"no column 'w' of vectors; it has v"),
        (("v", tmp_path / "c", 2), "already exists"),
        (("v", tmp_path / "d", 60), "59 vectors do not make 60 clusters"),
        (("v", tmp_path / "d", 2, [source]), "no labels of `longclip cluster`"),
    ):
        with pytest.raises(UserError, match=words):
            cluster(source, *arguments)
    elsewhere = table(tmp_path, [n % 2 for n in range(COUNT)], "other", [f"other-{key}" for key in KEYS])
    with pytest.raises(UserError, match=r"/c \(--within\) and .*/other have no keys in common"):
        cluster(elsewhere, "v", tmp_path / "d", 2, [tmp_path / "c"])
    assert not (tmp_path / "d").exists()
