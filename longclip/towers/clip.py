"""DualTower: a batch -> Embeddings. It owns the open_clip model (with its temperature) and nothing else.

What terms may ask for beyond global features stands in `needs`, how that is made in `answers`. The open_clip
model keeps its own names below `backbone.`, so what is trained is what is exported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..tokens import pack
from ..types import Batch, Embeddings, Text
from .answers import Encoders, embed, embed_start
from .cached import Cached, column_of, stored
from .chunks import chunks
from .experts import Experts
from .freezing import Freeze, lock
from .glimpse import Glimpse
from .image import take_any_side
from .lora import Lora, adapt
from .needs import make_ready
from .pooled import pool_alone
from .pretrained import Backbone
from .text import encode_padded, laid_out, why_padded

log = logging.getLogger(__name__)


class DualTower(nn.Module):
    """An open_clip model that reads packed captions.

    Args:
        backbone: the model and what describes it (`pretrained.build`).
        freeze: which towers are locked.
        lora: matrices of what is not locked learn differences of low rank alone.
        glimpse: how images with hidden patches look, where a term reads them.
        corners: how many further features a text has, where a term reads them.
        experts: what stands in the place of the blocks' MLPs, where a term reads the routing.
        cached: what of a locked tower is read from side-cars while training.
        grad_checkpointing: recompute activations block by block in the backward pass.
        compile: `torch.compile` both encoders (token counts are dynamic).
        scale: initial temperature factor exp(logit_scale); None keeps what the weights bring.
    """

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
        experts: Experts = Experts(),
        cached: Cached = Cached(),
    ) -> None:
        super().__init__()
        self.backbone = backbone.model
        self.tokenizer, self.published = backbone.tokenizer, backbone.published
        self.model_cfg, self.preprocess_cfg = backbone.model_cfg, backbone.preprocess_cfg
        self.register_buffer("mean_C11", _per_channel(self.preprocess_cfg["mean"]), persistent=False)
        self.register_buffer("std_C11", _per_channel(self.preprocess_cfg["std"]), persistent=False)
        self.padded_because = why_padded(self.backbone)
        if self.padded_because:
            log.warning("text runs padded to %d tokens: %s", self.context_length, self.padded_because)
        take_any_side(self.backbone.visual)
        pool_alone(self.backbone.visual)
        self.glimpse, self.corners, self.experts = glimpse, corners, experts
        for name in ("hidden_D", "corners_MD"):  # made where a term reads it; trained, never exported
            self.register_parameter(name, None)
        self.start: list[DualTower] = []  # in a list, so that it is neither trained nor saved
        self.recalled: frozenset[str] | None = None  # caption groups that it reads; None: all
        # A plan has no weights at all.
        self.random = backbone.random and not self.backbone.logit_scale.is_meta
        if self.random and (freeze.image or freeze.text):
            log.warning(
                "model.freeze keeps weights that are random: model.backbone.weights names better ones"
            )
        lock(self.backbone, freeze)
        adapt(self.backbone, lora)
        self.cached = column_of(self.backbone.visual, cached, self.model_cfg["embed_dim"])
        self.grad_checkpointing = grad_checkpointing
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)
        if scale is not None:
            with torch.no_grad():
                self.backbone.logit_scale.fill_(torch.tensor(scale).log())
        self.encoders = Encoders()
        if compile:
            self.encoders = self.encoders.compiled()
            self.backbone.visual.compile()

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    def check_needs(self, needs: frozenset[str], recalled: frozenset[str] | None = None) -> None:
        """Make ready for what the terms will ask for, of the start in these caption groups alone.

        Raises UserError, see `needs.make_ready`.
        """
        self.recalled = recalled
        make_ready(self, needs)

    def forward(
        self,
        batch: Batch,
        slots: dict[str, slice],
        needs: frozenset[str] = frozenset(),
        micro_batch: int | None = None,
    ) -> Embeddings:
        """Encode a batch.

        Args:
            batch: pixels and lengths may still lie on the host, tokens and columns on this module's device.
            slots: caption group -> its slots along K.
            needs: what the terms ask for beyond the global features.
            micro_batch: images encoded at a time, each chunk again in the backward pass, so that the memory
                for activations is that of one chunk; None: all at once. The result is the same.
        """
        parts = list(chunks(batch, micro_batch, stored(self, batch)))
        return replace(
            embed(self, parts, slots, needs),
            boxes_BK4=batch.boxes_BK4,
            weights_BK=batch.weights_BK,
            columns=batch.columns,
            start=embed_start(self, parts, slots) if "start" in needs else None,
        )

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
        if len(lengths_S) == 0:  # training encodes an empty caption instead, for the graph (`answers`)
            return torch.zeros(0, self.model_cfg["embed_dim"], device=tokens_T.device)
        if self.padded_because:
            text_SE = encode_padded(
                self.backbone, tokens_T, lengths_S, self.context_length, self.tokenizer.pad_id
            )
        else:
            layout = laid_out(self.backbone, lengths_S, tokens_T.device)
            text_SE = self.encoders.text(self.backbone, tokens_T, layout)
        return F.normalize(text_SE.float(), dim=-1)

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


def _per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]
