"""Pictures and texts of a published set, as a tower sees them.

In: places of encoded images, plain texts. Out: pixels batch by batch, L2-normalised float32 features. Also
the two sentences for a set that is not there, or not the whole of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.converting.layouts.files import Folder, Place, Unusable
from ..data.faults import Damaged
from ..data.images import EvalTransform
from ..data.judging import THREADS
from ..data.loading import decoded
from ..data.module import transform_of
from ..towers.asking import ask
from ..types import UserError

if TYPE_CHECKING:
    from ..towers.clip import DualTower

log = logging.getLogger(__name__)

Load = Callable[[], Tensor]
"""Reads and decodes one picture: uint8 [3, H, W]."""
NAMED = 5  # faults that a sentence lists


@dataclass(frozen=True)
class Picture:
    """An encoded image, or the part of it that is meant. Equal pictures need encoding once."""

    place: Place
    box: tuple[int, int, int, int] | None = None  # left, top, width, height, in pixels

    def __call__(self) -> Tensor:
        """uint8 [3, H, W]; what of the box lies beyond the image is left out."""
        try:
            image_CHW = decoded(self.place.read())
        except (Damaged, Unusable) as error:
            raise UserError(f"{self.place.path}: {error.reason}; get the set again") from error
        if self.box is None:
            return image_CHW
        left, top, width, height = self.box
        part_CHW = image_CHW[:, max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
        if part_CHW.numel() == 0:
            raise UserError(f"{self.place.path}: its box {self.box} lies beyond the image; get the set again")
        return part_CHW


def transform_for(tower: DualTower, resize_mode: str | None) -> EvalTransform:
    """The model's own preprocessing; `resize_mode`, where given, says how pictures are made square."""
    own = tower.preprocess_cfg
    return transform_of({**own, "resize_mode": resize_mode or own["resize_mode"]})


def pixel_batches(parts: Iterable[Sequence[Load]], transform: EvalTransform) -> Iterator[Tensor]:
    """uint8 pixels_BCHW of each part, the next one decoded by threads while this one is looked at."""

    def shown(load: Load) -> Tensor:
        return transform(load())

    with ThreadPoolExecutor(THREADS) as pool:
        coming: list[Future[Tensor]] = []
        for part in parts:
            here, coming = coming, [pool.submit(shown, load) for load in part]
            if here:
                yield torch.stack([one.result() for one in here])
        if coming:
            yield torch.stack([one.result() for one in coming])


def text_features(tower: DualTower, texts: Sequence[str], at_once: int = 256) -> tuple[Tensor, Tensor]:
    """(text_SE, which of the texts the context length cut, [S] bool), both on the host."""
    size = transform_for(tower, None).size
    blank_1CHW = torch.zeros(1, 3, size, size, dtype=torch.uint8)  # a tower sees a picture, too
    features, cut = [], []
    for start in range(0, len(texts), at_once):
        found, dropped_S = ask(tower, blank_1CHW, texts[start : start + at_once])
        features.append(found.text_BKE[0])
        cut.append(dropped_S > 0)
    return torch.cat(features).cpu(), torch.cat(cut)


def opened(root: str, tree: str) -> Folder:
    """The folder of a set. Links may lead out of it: what is read there is a picture or a listing.

    Raises:
        UserError: there is none; shows the tree that is expected.
    """
    if not Path(root).is_dir():
        raise UserError(absent(root, "is no folder", tree))
    return Folder(Path(root), follow_links=True)


def absent(root: str, what: str, tree: str) -> str:
    """The sentence for a set that is not there."""
    lines = "\n".join(f"    {line}" for line in tree.strip().splitlines())
    where = "put the set there, or say where it is with benchmark.NAME.root=DIR"
    return f"{root} {what}; {where}. Expected in it:\n{lines}"


def check_whole(root: str, kind: str, found: int, expected: int | None, faults: Sequence[str]) -> None:
    """Refuse a set that is not the published one; `expected` None takes what there is.

    Raises:
        UserError: says how many there are, and the first of those that cannot be used.
    """
    if found == 0 or (expected is not None and found != expected):
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        listed = f": {', '.join(faults[:NAMED])}{more}" if faults else ""
        wanted = kind if expected is None else f"{expected} {kind}"
        raise UserError(
            f"{root}: expected {wanted}, found {found}{listed}; get the set again, or judge what is there "
            "with expected=null (the result then carries no protocol)"
        )


def check_keys(root: str, keys: Iterable[str], wanted: str | None) -> None:
    """Refuse a set of as many items as the published one, but others; `wanted` None only tells the digest.

    Raises:
        UserError: the SHA-256 of the sorted keys, one a line, is not the one that is wanted.
    """
    digest = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
    if wanted not in (None, digest):
        raise UserError(
            f"{root}: as many as expected, but not the same ones (SHA-256 of the sorted keys {digest}, "
            f"expected {wanted}); get the set again, or judge it with expected=null"
        )
    log.info("%s: SHA-256 of the sorted keys %s", root, digest)


def protocol_id(protocol: str, expected: int | None, *parts: str | None) -> str:
    """The id that findings carry, with what changes it; "" where the set need not be the published one."""
    return "/".join([protocol, *filter(None, parts)]) if protocol and expected is not None else ""
