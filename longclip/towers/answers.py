"""How towers answer what terms ask for (`needs`): chunks of a batch in, `Embeddings` out.

Functions of a `DualTower` that is ready. Each part of the answer is made only where a term asks for it.
Global features are L2-normalised float32; the others come in the dtype that the tower computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..dist import Gather
from ..types import Embeddings, Words
from .cached import project
from .chunks import Chunk, in_backward_again
from .corners import cornered, encode_corners
from .experts import overheard, summed, unheard
from .glimpse import encode_glimpse
from .image import encode_patches, grid, keep
from .start import cut
from .text import encode_packed, encode_words, laid_out

if TYPE_CHECKING:
    from .clip import DualTower


class Encoders(NamedTuple):
    """The functions that run a packed text tower."""

    text: Callable[..., Tensor] = encode_packed
    words: Callable[..., Tensor] = encode_words
    corners: Callable[..., tuple[Tensor, Tensor]] = encode_corners

    def compiled(self) -> Encoders:
        """The same by `torch.compile`; token counts are dynamic."""
        return Encoders(
            torch.compile(self.text, dynamic=True),
            torch.compile(self.words, dynamic=True),
            torch.compile(self.corners, dynamic=True),
        )


class Texts(NamedTuple):
    """What the text tower makes of captions, by the names of `Embeddings`."""

    text_BKE: Tensor  # zeros where there is no caption
    words_TE: Tensor | None = None
    corners_BKME: Tensor | None = None


def embed(
    tower: DualTower, parts: Sequence[Chunk], slots: dict[str, slice], needs: frozenset[str]
) -> Embeddings:
    """All that the towers themselves make of a batch; several parts are made again in the backward pass."""
    run = in_backward_again if len(parts) > 1 and torch.is_grad_enabled() else _at_once
    scale = tower.backbone.logit_scale  # shows `in_backward_again` the device
    with overheard(tower.backbone, "routing" in needs) as heard:
        # Images and texts in turns of their own: the activations of one tower at a time.
        images = [
            run(embed_images, tower, part.pixels_BCHW, needs, scale, part.stored_BF, part.draws_B)
            for part in parts
        ]
        masked = [
            run(embed_masked, tower, part.pixels_BCHW, part.draws_B, scale)
            for part in parts
            if "masked" in needs
        ]
        texts = [run(embed_texts, tower, part.tokens_T, part.lengths_BK, needs) for part in parts]
    image_BE, patches_BPE = (_side_by_side(found) for found in zip(*images, strict=True))
    text_BKE, words_TE, corners_BKME = (_side_by_side(found) for found in zip(*texts, strict=True))
    lengths_BK = np.concatenate([part.lengths_BK for part in parts])
    return Embeddings(
        image_BE=image_BE,
        text_BKE=text_BKE,
        mask_BK=torch.from_numpy(lengths_BK > 0).to(scale.device),
        slots=slots,
        scale=scale.float().exp().squeeze(),  # [1] in some open_clip models
        gather=Gather(),
        patches_BPE=patches_BPE,
        masked_BE=_side_by_side(masked),
        grid=None if patches_BPE is None else grid(tower.backbone.visual, parts[0].pixels_BCHW, patches_BPE),
        words=None if words_TE is None else Words(words_TE, lengths_BK),
        corners_BKME=corners_BKME,
        routing_A2N=summed(heard),
    )


def embed_start(tower: DualTower, parts: Sequence[Chunk], slots: dict[str, slice]) -> Embeddings:
    """The same of the weights at the start of the run, global features alone, without gradient.

    Of captions in groups that are not asked of it (`tower.recalled`) there are none.
    """
    (start,) = tower.start
    read_K = recalled(tower, slots, parts[0].lengths_BK.shape[1])
    shown = [cut(part, start.tokenizer, read_K) for part in parts]
    with torch.no_grad():
        return embed(start.to(tower.backbone.logit_scale.device), shown, slots, frozenset())


def recalled(tower: DualTower, slots: dict[str, slice], width: int) -> NDArray[np.bool_]:
    """Of so many slots, those whose captions the start reads."""
    read_K = np.zeros(width, np.bool_)
    for group in slots if tower.recalled is None else tower.recalled:
        read_K[slots[group]] = True
    return read_K


def embed_images(
    tower: DualTower,
    pixels_BCHW: Tensor,
    needs: frozenset[str],
    near: Tensor | None = None,
    stored_BF: Tensor | None = None,
    draws_B: NDArray[np.int64] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(image_BE, patches_BPE where asked for); where features are stored, of them and not of the pixels.

    `near` is not read: it lies where the weights do. `draws_B`: by which patch dropout chooses.
    """
    if stored_BF is not None:
        return project(tower, stored_BF), None
    if draws_B is not None:
        keep(tower.backbone.visual, pixels_BCHW.shape[-2:], draws_B, tower.mean_C11.device)
    if "patches" not in needs:
        return tower.encode_image(pixels_BCHW), None
    image_BE, patches_BPE = encode_patches(tower.backbone.visual, tower.normalise(pixels_BCHW))
    return F.normalize(image_BE.float(), dim=-1), patches_BPE


def embed_masked(
    tower: DualTower, pixels_BCHW: Tensor, draws_B: NDArray[np.int64], near: Tensor | None = None
) -> Tensor:
    """masked_BE: the images with patches hidden as their draws say. `near`: see `embed_images`."""
    pixels_BCHW = tower.normalise(pixels_BCHW)
    masked_BE = encode_glimpse(
        tower.backbone.visual, pixels_BCHW, draws_B, tower.glimpse.hidden, tower.hidden_D
    )
    return F.normalize(masked_BE.float(), dim=-1)


def embed_texts(
    tower: DualTower, tokens_T: Tensor, lengths_BK: NDArray[np.int32], needs: frozenset[str]
) -> Texts:
    """Packed captions, whose lengths are on the host, each in its slot."""
    lengths_X = lengths_BK.ravel()
    present_S = np.flatnonzero(lengths_X)
    where_S = torch.from_numpy(present_S).to(tokens_T.device, non_blocking=True)
    text_SE, words_TE, corners_SME = _encode_texts(tower, tokens_T, lengths_X[present_S], needs)

    def slots(x_SE: Tensor) -> Tensor:
        x_XE = x_SE.new_zeros(len(lengths_X), *x_SE.shape[1:]).index_copy(0, where_S, x_SE)
        return x_XE.unflatten(0, lengths_BK.shape)

    return Texts(
        slots(text_SE),
        words_TE if "words" in needs else None,
        None if corners_SME is None else slots(corners_SME),
    )


def _encode_texts(
    tower: DualTower, tokens_T: Tensor, lengths_S: NDArray[np.int32], needs: frozenset[str]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(text_SE, words_TE, corners_SME) of captions without slots."""
    if len(lengths_S) == 0:
        return _encode_nothing(tower, tokens_T, needs)
    if not {"words", "corners"} & needs:
        return tower.encode_text(tokens_T, lengths_S), None, None
    corners = tower.corners_MD if "corners" in needs else None
    layout, corners_SME = laid_out(tower.backbone, lengths_S, tokens_T.device), None
    if corners is None:
        words_TE = tower.encoders.words(tower.backbone, tokens_T, layout)
    else:
        words_TE, corners_SME = tower.encoders.corners(tower.backbone, tokens_T, corners, cornered(layout))
        corners_SME = F.normalize(corners_SME.float(), dim=-1)
    return F.normalize(words_TE.index_select(0, layout.ends_S).float(), dim=-1), words_TE, corners_SME


def _encode_nothing(
    tower: DualTower, tokens_T: Tensor, needs: frozenset[str]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same of no caption at all, with a graph: none of an empty caption's rows.

    Every process takes part in what the backward pass exchanges (gathered rows, the gradients of the same
    parameters), though its own images have no captions of these groups.
    """
    empty = [*tower.tokenizer.prefix, *tower.tokenizer.suffix] or [tower.tokenizer.pad_id]
    empty_T = torch.tensor(empty, dtype=tokens_T.dtype, device=tokens_T.device)
    with unheard(tower.backbone):
        text_1E, words_TE, corners_1ME = _encode_texts(
            tower, empty_T, np.array([len(empty)], np.int32), needs
        )
    return (
        text_1E[:0],
        None if words_TE is None else words_TE[:0],
        None if corners_1ME is None else corners_1ME[:0],
    )


def _at_once(encode: Callable[..., Any], *args: Any) -> Any:
    return encode(*args)


def _side_by_side(parts: Sequence[Tensor | None]) -> Any:
    """One tensor of those of all parts; None where it was not asked for."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None
