"""DualTower: a batch -> Embeddings. It owns the open_clip model (with its temperature) and nothing else.

The open_clip model keeps its own names below `backbone.`, so what is trained is what is exported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..dist import Gather
from ..tokens import pack
from ..types import Batch, Embeddings, Text, UserError, Words
from .attention import Layout
from .chunks import Chunk, chunks, in_backward_again
from .corners import cornered, encode_corners, first_corners
from .freezing import Freeze, lock
from .glimpse import Glimpse, check_glimpses, encode_glimpse
from .image import check_patches, encode_patches, grid, take_any_side
from .lora import Lora, adapt
from .pooled import pool_alone
from .pretrained import Backbone
from .start import cut, frozen
from .text import encode_packed, encode_padded, encode_words, why_padded

log = logging.getLogger(__name__)


class DualTower(nn.Module):
    """An open_clip model that reads packed captions.

    Args:
        backbone: the model and what describes it (`pretrained.build`).
        freeze: which towers are locked.
        lora: matrices of what is not locked learn differences of low rank alone.
        glimpse: how images with hidden patches look, where a term reads them.
        corners: how many further features a text has, where a term reads them.
        grad_checkpointing: recompute activations block by block in the backward pass.
        compile: `torch.compile` both encoders (token counts are dynamic).
        scale: initial temperature factor exp(logit_scale); None keeps what the weights bring.
    """

    NEEDS: ClassVar[frozenset[str]] = frozenset({"patches", "masked", "words", "corners", "start"})
    """What terms may ask for beyond global features: fields of `Embeddings`, less their axes."""

    backbone: Any  # open_clip's CLIP or CustomTextCLIP
    hidden_D: Tensor | None  # shown for hidden patches
    corners_MD: Tensor | None  # stand behind every text
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        backbone: Backbone,
        freeze: Freeze = Freeze(),
        grad_checkpointing: bool = False,
        compile: bool = False,
        scale: float | None = None,
        lora: Lora = Lora(),
        glimpse: Glimpse = Glimpse(),
        corners: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = backbone.model
        self.tokenizer = backbone.tokenizer
        self.model_cfg, self.preprocess_cfg = backbone.model_cfg, backbone.preprocess_cfg
        self.register_buffer("mean_C11", _per_channel(self.preprocess_cfg["mean"]), persistent=False)
        self.register_buffer("std_C11", _per_channel(self.preprocess_cfg["std"]), persistent=False)
        self.padded_because = why_padded(self.backbone)
        if self.padded_because:
            log.warning("text runs padded to %d tokens: %s", self.context_length, self.padded_because)
        take_any_side(self.backbone.visual)
        pool_alone(self.backbone.visual)
        self.glimpse, self.corners = glimpse, corners
        for name in ("hidden_D", "corners_MD"):  # made where a term reads it; trained, never exported
            self.register_parameter(name, None)
        lock(self.backbone, freeze)
        adapt(self.backbone, lora)
        self.grad_checkpointing = grad_checkpointing
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)
        if scale is not None:
            with torch.no_grad():
                self.backbone.logit_scale.fill_(torch.tensor(scale).log())
        self._encode_packed, self._encode_words = encode_packed, encode_words
        self._encode_corners = encode_corners
        self._published_LD = backbone.published_LD
        self.start: list[DualTower] = []  # in a list, so that it is neither trained nor saved
        if compile:
            self._encode_packed = torch.compile(encode_packed, dynamic=True)
            self._encode_words = torch.compile(encode_words, dynamic=True)
            self._encode_corners = torch.compile(encode_corners, dynamic=True)
            self.backbone.visual.compile()

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    def check_needs(self, needs: frozenset[str]) -> None:
        """Make ready for what the terms will ask for, before anything is trained or loaded.

        Raises:
            UserError: these towers cannot give it.
        """
        assert needs <= self.NEEDS, f"towers give {sorted(self.NEEDS)}, a term asks for {sorted(needs)}"
        if "patches" in needs:
            check_patches(self.backbone.visual)
        if "masked" in needs:
            check_glimpses(self.backbone.visual, self.glimpse)
            if self.glimpse.replace and self.hidden_D is None:
                self.hidden_D = nn.Parameter(torch.zeros(self.backbone.visual.conv1.out_channels))
        if {"words", "corners"} & needs and self.padded_because:
            raise UserError(
                "a term of this recipe reads every token of a caption, which this text tower does not give: "
                f"{self.padded_because}; choose open_clip's own (model.backbone.architecture=ViT-B-16)"
            )
        if "corners" in needs and self.corners_MD is None:
            self.corners_MD = nn.Parameter(first_corners(self.backbone, self.tokenizer, self.corners))
        if "start" in needs and not self.start:
            self.start.append(frozen(self, self._published_LD))

    def hold(self) -> None:
        """Nothing. FSDP2 takes it for a forward and gathers the weights (`strategies.states`)."""

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 pixels -> the floats that the image tower was trained on, on its device."""
        pixels_BCHW = pixels_BCHW.to(self.mean_C11.device, non_blocking=True)
        return (pixels_BCHW.float() / 255 - self.mean_C11) / self.std_C11

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 pixels, on the host or here -> image_BE, L2-normalised float32."""
        return F.normalize(self.backbone.visual(self.normalise(pixels_BCHW)).float(), dim=-1)

    def encode_text(self, tokens_T: Tensor, lengths_S: NDArray[np.int32]) -> Tensor:
        """Packed captions -> text_SE, L2-normalised float32; the lengths are on the host."""
        if len(lengths_S) == 0:  # none of these images has a caption of the recipe's groups
            return self._nothing(tokens_T)
        if self.padded_because:
            text_SE = encode_padded(
                self.backbone, tokens_T, lengths_S, self.context_length, self.tokenizer.pad_id
            )
        else:
            layout = Layout(lengths_S, tokens_T.device)
            text_SE = self._encode_packed(self.backbone, tokens_T, layout)
        return F.normalize(text_SE.float(), dim=-1)

    def encode_words(self, tokens_T: Tensor, lengths_S: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """As `encode_text`, and beside it what every token says: words_TE in the joint space, as it comes."""
        if len(lengths_S) == 0:
            return self._nothing(tokens_T), self._nothing(tokens_T)
        layout = Layout(lengths_S, tokens_T.device)
        words_TE = self._encode_words(self.backbone, tokens_T, layout)
        return F.normalize(words_TE.index_select(0, layout.ends_S).float(), dim=-1), words_TE

    def encode_corners(self, tokens_T: Tensor, lengths_S: NDArray[np.int32]) -> tuple[Tensor, Tensor, Tensor]:
        """As `encode_words`, and what the corners say: corners_SME, L2-normalised float32."""
        if len(lengths_S) == 0:
            nothing = self._nothing(tokens_T)
            return nothing, nothing, nothing[:, None].expand(0, self.corners, -1)
        assert self.corners_MD is not None, "check_needs makes them"
        layout = Layout(lengths_S, tokens_T.device)
        words_TE, corners_SME = self._encode_corners(
            self.backbone, tokens_T, self.corners_MD, cornered(layout)
        )
        text_SE = words_TE.index_select(0, layout.ends_S)
        return F.normalize(text_SE.float(), dim=-1), words_TE, F.normalize(corners_SME.float(), dim=-1)

    def _nothing(self, tokens_T: Tensor) -> Tensor:
        return torch.zeros(0, self.model_cfg["embed_dim"], device=tokens_T.device)

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Plain strings -> text_SE, as `encode_text`; captions beyond the context are cut."""
        return self.encode_ids(
            [Text(self.tokenizer.ids(self.tokenizer.clean(caption))) for caption in captions]
        )

    def encode_ids(self, texts: Sequence[Text]) -> Tensor:
        """The same of captions that are tokenised already."""
        packed = pack([[text] for text in texts], self.tokenizer)
        tokens_T = packed.tokens_T.to(self.backbone.logit_scale.device)
        return self.encode_text(tokens_T, packed.lengths_BK.numpy().ravel())

    def forward(
        self,
        batch: Batch,
        slots: dict[str, slice],
        needs: frozenset[str] = frozenset(),
        micro_batch: int | None = None,
    ) -> Embeddings:
        """Encode a batch.

        Args:
            batch: pixels and lengths may still lie on the host, tokens on this module's device.
            slots: caption group -> its slots along K.
            needs: what the terms ask for beyond the global features.
            micro_batch: images encoded at a time, each chunk again in the backward pass, so that the memory
                for activations is that of one chunk; None: all at once. The result is the same.
        """
        parts = list(chunks(batch, micro_batch))
        found = self.embed(parts, slots, needs)
        return replace(
            found,
            boxes_BK4=batch.boxes_BK4,
            weights_BK=batch.weights_BK,
            columns=batch.columns,
            start=self._at_start(parts, slots) if "start" in needs else None,
        )

    def _at_start(self, parts: Sequence[Chunk], slots: dict[str, slice]) -> Embeddings:
        (start,) = self.start
        shown = [cut(part, start.tokenizer) for part in parts]
        with torch.no_grad():
            return start.to(self.backbone.logit_scale.device).embed(shown, slots, frozenset())

    def embed(self, parts: Sequence[Chunk], slots: dict[str, slice], needs: frozenset[str]) -> Embeddings:
        """The same of a batch that is cut already."""
        run = in_backward_again if len(parts) > 1 and torch.is_grad_enabled() else _at_once
        scale = self.backbone.logit_scale
        # Images and texts in turns of their own: the activations of one tower at a time.
        images = [run(self.embed_images, part.pixels_BCHW, "patches" in needs, scale) for part in parts]
        masked = [
            run(self.embed_masked, part.pixels_BCHW, part.draws_B, scale)
            for part in parts
            if "masked" in needs
        ]
        wants = "words" in needs, "corners" in needs
        texts = [run(self.embed_texts, part.tokens_T, part.lengths_BK, *wants) for part in parts]
        lengths_BK = np.concatenate([part.lengths_BK for part in parts])
        image_BE = _side_by_side([image for image, _ in images])
        patches = [patches_BPE for _, patches_BPE in images if patches_BPE is not None]
        words = [words_TE for _, words_TE, _ in texts if words_TE is not None]
        corners = [corners_BKME for *_, corners_BKME in texts if corners_BKME is not None]
        return Embeddings(
            image_BE=image_BE,
            text_BKE=_side_by_side([text for text, *_ in texts]),
            mask_BK=torch.from_numpy(lengths_BK > 0).to(scale.device),
            slots=slots,
            scale=scale.float().exp().squeeze(),  # [1] in some open_clip models
            gather=Gather(),
            patches_BPE=_side_by_side(patches) if patches else None,
            masked_BE=_side_by_side(masked) if masked else None,
            grid=grid(self.backbone.visual, parts[0].pixels_BCHW, patches[0]) if patches else None,
            words=Words(_side_by_side(words), lengths_BK) if words else None,
            corners_BKME=_side_by_side(corners) if corners else None,
        )

    def embed_images(
        self, pixels_BCHW: Tensor, patches: bool, near: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(image_BE, patches_BPE where asked for, in the dtype that the tower computes in).

        `near` is not read: its device is what `in_backward_again` wants to know.
        """
        if not patches:
            return self.encode_image(pixels_BCHW), None
        image_BE, patches_BPE = encode_patches(self.backbone.visual, self.normalise(pixels_BCHW))
        return F.normalize(image_BE.float(), dim=-1), patches_BPE

    def embed_masked(
        self, pixels_BCHW: Tensor, draws_B: NDArray[np.int64], near: Tensor | None = None
    ) -> Tensor:
        """masked_BE: the images with patches hidden as their draws say. `near`: see `embed_images`."""
        pixels_BCHW = self.normalise(pixels_BCHW)
        masked_BE = encode_glimpse(
            self.backbone.visual, pixels_BCHW, draws_B, self.glimpse.hidden, self.hidden_D
        )
        return F.normalize(masked_BE.float(), dim=-1)

    def embed_texts(
        self, tokens_T: Tensor, lengths_BK: NDArray[np.int32], words: bool = False, corners: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(text_BKE, zeros where there is no caption; words_TE and corners_BKME where asked for).

        Lengths are on the host.
        """
        lengths_X = lengths_BK.ravel()
        present_S = np.flatnonzero(lengths_X)
        lengths_S, words_TE, corners_SME = lengths_X[present_S], None, None
        if corners:
            text_SE, words_TE, corners_SME = self.encode_corners(tokens_T, lengths_S)
        elif words:
            text_SE, words_TE = self.encode_words(tokens_T, lengths_S)
        else:
            text_SE = self.encode_text(tokens_T, lengths_S)
        where_S = torch.from_numpy(present_S).to(tokens_T.device, non_blocking=True)

        def slots(x_SE: Tensor) -> Tensor:
            x_XE = x_SE.new_zeros(len(lengths_X), *x_SE.shape[1:]).index_copy(0, where_S, x_SE)
            return x_XE.unflatten(0, lengths_BK.shape)

        return (
            slots(text_SE),
            words_TE if words else None,
            None if corners_SME is None else slots(corners_SME),
        )


def _at_once(encode: Callable[..., Any], *args: Any) -> Any:
    return encode(*args)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]
