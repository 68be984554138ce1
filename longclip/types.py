"""The nouns: what flows from a shard to a loss. No behaviour beyond looking things up."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:  # so that `longclip doctor` runs where torch does not import
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the image's width and height, in [0, 1]."""


Ids: TypeAlias = "array[int]"
"""Token ids, of the same type code (`Tokenizer.typecode`) wherever one tokenizer made them."""

NO_IDS: Ids = array("H")


class UserError(ValueError):
    """Something a user can mend. Its text is all they see: what is wrong, where, what to do next."""


class Elsewhere(UserError):  # noqa: N818 - it is where to look
    """This process stops because another one does, and that one says why."""


class Sentence(NamedTuple):
    """A span of its caption's text, with the token ids that open_clip's tokenizer gives it."""

    start: int
    end: int
    ids: Ids  # without start and end token; empty where not tokenised yet
    box: Box | None = None  # what the sentence talks about, where the data knows it


class Caption(NamedTuple):
    """One description of an image. `sentences` cover `text` in order, separators left out."""

    source: str  # who wrote it: "raw", "longSV", "human", ...
    text: str  # cleaned; spans point into this
    sentences: tuple[Sentence, ...]
    score: float | None = None  # how well it fits the image, where the data knows it


class Record(NamedTuple):
    """What a shard holds for one image: the encoded picture and everything said about it."""

    key: str  # unique within a dataset, no dots or slashes at the ends
    image: bytes  # encoded
    extension: str  # "jpg", "png" or "webp"
    captions: tuple[Caption, ...]
    meta: dict[str, object] = {}  # plain JSON values: provenance, group labels, ...


class Text(NamedTuple):
    """One caption slot as a policy fills it."""

    ids: Ids  # without start and end token, not truncated yet
    box: Box | None = None
    weight: float = 1.0  # how much it counts in losses that read weights, at least 0
    words: str | None = None  # a text that a policy wrote itself: `Groups` makes its ids


class Sample(NamedTuple):
    """One decoded image with its caption slots filled: what the loader hands to the collate."""

    key: str
    image_CHW: Tensor  # uint8
    texts: tuple[Text | None, ...]  # K slots; None where this image has no such caption
    columns: dict[str, Tensor] = {}  # what side-cars know of it: teacher embeddings, ...
    draw: int = 0  # what chance decides about it in the towers follows from this number


class Skip(NamedTuple):
    """A sample that could not be used; another one is shown in its place."""

    reason: str  # one of few, to be counted
    text: str  # which, where and why


class Batch(NamedTuple):
    """Flat tokens, no padding: caption (b, k) owns `lengths_BK[b, k]` tokens, in row-major order."""

    keys: list[str]
    pixels_BCHW: Tensor  # uint8; normalised on the device
    tokens_T: Tensor  # int32, start and end tokens included
    lengths_BK: Tensor  # int32, on the host, which cuts by it; 0 where this image has no such caption
    dropped_BK: Tensor  # int32; tokens that the context length cut off
    longest: int  # max of lengths_BK, known on the host so that the device need not be asked
    withheld: int = 0  # tokens that fit the context and that a curriculum left out all the same
    columns: dict[str, Tensor] = {}  # what side-cars know of each image, [B, ...]; NaN where they do not
    boxes_BK4: Tensor | None = (
        None  # what a caption is about, as shown; NaN where unknown; None: nowhere known
    )
    weights_BK: Tensor | None = None  # how much a caption counts; None: all alike
    draws_B: Tensor | None = None  # int64, on the host, see `Sample`; None: 0 for all
    skips: Sequence[Skip] = ()  # samples left out while this batch was made
    fault: str | None = None  # why this process cannot go on; the rest is then blank, but of the right shape


class Words(NamedTuple):
    """The text tower's tokens in the joint space, packed as they went in."""

    states_TE: Tensor  # not normalised, in the dtype of the towers; start and end token included
    lengths_BK: NDArray[np.int32]  # on the host; 0 where there is no caption


@dataclass(frozen=True)
class Embeddings:
    """What the towers make of a batch. Global features are float32 and L2-normalised.

    `gather` concatenates a tensor over all processes along its first axis, in rank order, with
    gradient (see `dist.Gather`); it is the identity on one process. Terms call it, so that losses
    and gradients do not depend on how many processes hold the batch.
    """

    image_BE: Tensor
    text_BKE: Tensor  # zeros where mask_BK is False
    mask_BK: Tensor  # bool: the slot holds a caption
    slots: dict[str, slice]  # caption group -> its slots along K
    scale: Tensor  # exp(logit_scale), a scalar
    gather: Callable[[Tensor], Tensor]
    patches_BPE: Tensor | None = None  # in the joint space, not normalised, in the dtype of the towers
    grid: tuple[int, int] | None = None  # patches down and across, row by row; None where some were left out
    words: Words | None = None
    masked_BE: Tensor | None = None  # the images with most of their patches hidden, as `image_BE`
    corners_BKME: Tensor | None = None  # further features of every text, as `text_BKE`
    routing_A2N: Tensor | None = None  # how often each block's experts were asked, and how probable they were
    start: Embeddings | None = (
        None  # the same batch as the weights at the start of the run embed it, no gradient
    )
    boxes_BK4: Tensor | None = None  # see `Batch`
    weights_BK: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # see `Batch`

    def text(self, group: str) -> Tensor:
        """This process's texts of a group, [B, k, E]."""
        return self.text_BKE[:, self.slots[group]]

    def mask(self, group: str) -> Tensor:
        """Which of them exist, [B, k] bool."""
        return self.mask_BK[:, self.slots[group]]

    def boxes(self, group: str) -> Tensor:
        """What this process's captions are about, [B, k, 4] in fractions of the image; NaN where unknown."""
        if self.boxes_BK4 is None:
            return self.image_BE.new_full((*self.mask(group).shape, 4), math.nan)
        return self.boxes_BK4[:, self.slots[group]]

    def weights(self, group: str) -> Tensor:
        """How much this process's captions count, [B, k]; 0 where there is none."""
        mask_Bk = self.mask(group)
        weights_BK = 1.0 if self.weights_BK is None else self.weights_BK[:, self.slots[group]]
        return mask_Bk * weights_BK

    def column(self, name: str) -> Tensor:
        """What side-cars know of this process's images, [B, ...]; NaN where they do not.

        Raises:
            UserError: the batch carries no such column.
        """
        if name not in self.columns:
            has = f"it has {', '.join(sorted(self.columns))}" if self.columns else "it has none"
            raise UserError(
                f"this recipe reads the column {name!r} of the training data, and {has}: join a side-car "
                f"that holds it (longclip sidecar SRC --key COLUMN --out DIR, then data.sidecar.stores=[DIR] "
                f"data.sidecar.columns=[{name}])"
            )
        return self.columns[name]

    def all_images(self) -> Tensor:
        """The images of all processes, [world * B, E], with gradient."""
        return self.gather(self.image_BE)

    def all_mask(self, group: str) -> Tensor:
        """Which of them exist, [world * B, k] bool."""
        return self.gather(self.mask_BK)[:, self.slots[group]]
