"""Pictures with a class for every pixel, as VOC and ADE20k keep them.

In: a folder, and where pictures and masks lie in it. Out: `Scene`s; a mask is a PNG of class numbers (grey
or with a palette), of which 255 is ignored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.converting.layouts.files import Folder, Place, Unusable
from ..data.images import MAX_PIXELS
from ..types import UserError
from .showing import Picture, absent, check_keys, check_whole, opened

IGNORED = 255


class Scene(NamedTuple):
    key: str
    picture: Picture
    place: Place  # of its mask

    def mask(self) -> Tensor:
        """uint8 [H, W].

        Raises:
            UserError: no PNG of class numbers.
        """
        try:
            with Image.open(io.BytesIO(self.place.read()), formats=("PNG",)) as image:
                if image.mode not in ("L", "P") or image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.mode} of {image.width} x {image.height}")
                return torch.from_numpy(np.array(image))
        except (OSError, ValueError, SyntaxError, Unusable) as error:
            raise UserError(
                f"{self.place.path} is no mask ({error!s:.80}); masks are PNGs of class numbers, grey or "
                "with a palette: get the set again"
            ) from error


@dataclass(frozen=True)
class Masks:
    """How pictures and masks lie in a folder.

    Args:
        images: path of a picture, with {} for its name, such as "JPEGImages/{}.jpg".
        masks: the same of its mask.
        listing: a text file with a name on each line; None: every picture that `images` finds.
        zero_is_nothing: class 0 means unlabelled: it is ignored, and classes count from 1 (mmsegmentation's
            `reduce_zero_label`).
        tree: what the folder should look like, for people who have none yet.
    """

    images: str
    masks: str
    listing: str | None = None
    zero_is_nothing: bool = False
    tree: str = ""

    def read(self, root: str, expected: int | None = None, keys: str | None = None) -> list[Scene]:
        """All scenes of a folder, in the order of the listing.

        Raises:
            UserError: the folder or listing is missing, or it holds not `expected` pictures with masks.
        """
        folder = opened(root, self.tree)
        found = [self._scene(folder, name) for name in self._names(folder)]
        scenes = [one for one in found if isinstance(one, Scene)]
        faults = [one for one in found if isinstance(one, str)]
        check_whole(root, "pictures with masks", len(scenes), expected, faults)
        check_keys(root, (scene.key for scene in scenes), keys if expected else None)
        return scenes

    def labels(self, mask_HW: Tensor) -> Tensor:
        """Class numbers from 0, int64, with IGNORED where none counts."""
        label_HW = mask_HW.long()
        if not self.zero_is_nothing:
            return label_HW
        nothing_HW = (label_HW == 0) | (label_HW == IGNORED)
        return (label_HW - 1).masked_fill(nothing_HW, IGNORED)

    def _names(self, folder: Folder) -> list[str]:
        if self.listing is None:
            before, after = self.images.split("{}")
            paths = folder.match(self.images.replace("{}", "*"))
            names = [path[len(before) : len(path) - len(after)] for path in paths]
        else:
            place = folder.find(self.listing)
            names = Path(place.path).read_text("utf-8").split() if place else []
        if not names:
            raise UserError(absent(str(folder.root), f"lacks {self.listing or self.images}", self.tree))
        return names

    def _scene(self, folder: Folder, name: str) -> Scene | str:
        try:
            picture, mask = (
                folder.find(pattern.replace("{}", name)) for pattern in (self.images, self.masks)
            )
        except Unusable as error:
            return f"{name} ({error.reason})"
        if picture is None or mask is None:
            return f"{name} (no {'picture' if picture is None else 'mask'})"
        return Scene(name, Picture(picture), mask)
