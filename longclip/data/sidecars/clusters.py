"""`longclip cluster`: vectors of one side-car -> a side-car of labels, so that batches can be of look-alikes.

    report = cluster(Path("datasets/mine/teacher"), "teacher_image", Path("datasets/mine/clusters"), count=9)

In: a column of vectors, such as `longclip embed` writes. Out: a column of labels, those of spherical
k-means; inside the labels of earlier stages, where these are named (Zhang et al. 2024, arXiv 2402.11816: two
samples are alike if every stage finds them so). The vectors are held in memory, 4 bytes a number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...types import UserError
from .store import Store

COLUMN = "cluster"
ROUNDS = 25
SEEN = (
    65_536  # samples that the centres are found on; rows lie in the order of hashes, so the first are random
)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class ClusterReport(NamedTuple):
    """What was written."""

    rows: int
    labels: int  # that are not empty
    smallest: int
    largest: int
    missing: int  # rows without a vector, or without an earlier label


def cluster(source: Path, column: str, out: Path, count: int, within: Sequence[Path] = ()) -> ClusterReport:
    """Write a side-car of labels.

    Args:
        source: a side-car.
        column: of its vectors.
        out: the folder to make.
        count: clusters; times those of `within`.
        within: side-cars of earlier stages, made here.

    Raises:
        UserError: no such column; fewer vectors than clusters; the folder exists; an earlier
            stage has none of the samples.
    """
    store = Store(source)
    if store.kinds.get(column) != "vector":
        vectors = ", ".join(name for name, kind in store.kinds.items() if kind == "vector") or "none"
        raise UserError(f"{source} has no column {column!r} of vectors; it has {vectors} (--column NAME)")
    if out.exists():
        raise UserError(f"{out} already exists; choose another folder or remove it")
    rows = np.array([n for n in range(len(store.keys)) if len(store.vector(column, n))], np.int64)
    if count < 2 or len(rows) < count:
        raise UserError(f"{len(rows):,} vectors do not make {count} clusters: choose 2 or more, and fewer")
    store.width(column)
    vectors_ND = np.stack([store.vector(column, int(n)) for n in rows])
    vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    labels_N = np.full(len(store.keys), -1, np.int64)
    labels_N[rows] = nearest(vectors_ND, centres(vectors_ND[:SEEN], count))
    for folder in within:
        labels_N = _inside(labels_N, folder, store)
        if not (labels_N >= 0).any():
            raise UserError(
                f"{folder} (--within) and {source} have no keys in common; name a stage that was made of the "
                "same samples"
            )
    _write(store, labels_N, out)
    sizes = np.bincount(labels_N[labels_N >= 0])
    missing = int((labels_N < 0).sum())
    return ClusterReport(len(labels_N), len(sizes), int(sizes.min()), int(sizes.max()), missing)


def centres(vectors_ND: Floats, count: int) -> Floats:
    """Spherical k-means: unit vectors, of which each is the mean direction of those nearest to it.

    The first ones are vectors far from each other; a centre that nothing is near to moves to the vector that
    is farthest from its own.
    """
    found_KD = vectors_ND[:1]
    for _ in range(count - 1):
        farthest = (vectors_ND @ found_KD.T).max(axis=1).argmin()
        found_KD = np.concatenate([found_KD, vectors_ND[farthest : farthest + 1]])
    labels_N = nearest(vectors_ND, found_KD)
    for _ in range(ROUNDS):
        far = iter(np.argsort((vectors_ND * found_KD[labels_N]).sum(axis=1), kind="stable"))
        found_KD = np.stack([_centre(vectors_ND, labels_N == k, far) for k in range(count)])
        before_N, labels_N = labels_N, nearest(vectors_ND, found_KD)
        if (labels_N == before_N).all():
            break
    return found_KD


def _centre(vectors_ND: Floats, mine_N: NDArray[np.bool_], far: Iterator[np.int64]) -> Floats:
    mean_D: Floats = vectors_ND[mine_N].sum(axis=0) if mine_N.any() else vectors_ND[next(far)]
    return mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)


def nearest(vectors_ND: Floats, centres_KD: Floats) -> Ints:
    """Of each vector the nearest centre."""
    parts = [vectors_ND[n : n + SEEN] @ centres_KD.T for n in range(0, len(vectors_ND), SEEN)]
    return np.concatenate([part.argmax(axis=1) for part in parts])


def _inside(labels_N: Ints, folder: Path, store: Store) -> Ints:
    """Labels of pairs: one's own and that of an earlier stage; -1 where either is missing."""
    earlier = Store(folder)
    if earlier.kinds.get(COLUMN) != "label":
        raise UserError(f"{folder} holds no labels of `longclip cluster`; name one that does (--within DIR)")
    before_N = earlier.values(COLUMN, earlier.rows(store.keys))
    known_N = (labels_N >= 0) & (before_N >= 0)
    pairs_N2 = np.stack([before_N, labels_N], axis=1)[known_N]
    joined_N = np.full(len(labels_N), -1, np.int64)
    joined_N[known_N] = np.unique(pairs_N2, axis=0, return_inverse=True)[1].reshape(-1)
    return joined_N


def _write(store: Store, labels_N: Ints, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "keys.npy", store.keys)
    np.save(partial / f"{COLUMN}.npy", labels_N)
    described = json.loads((store.directory / "sidecar.json").read_bytes())
    described |= {"source": str(store.directory), "columns": {COLUMN: "label"}}
    (partial / "sidecar.json").write_text(json.dumps(described, indent=1) + "\n")
    partial.rename(out)
