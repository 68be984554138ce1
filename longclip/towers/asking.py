"""A tower on pictures and plain texts that come in no batch of a data set.

In: uint8 pixels, texts. Out: `Embeddings`. By the tower's forward and not by the functions that it calls:
there FSDP2 gathers the weights that it has split, so that all of this works during training, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..tokens import pack
from ..types import Batch, Embeddings, Text

if TYPE_CHECKING:
    from .clip import DualTower


def ask(
    tower: DualTower, pixels_BCHW: Tensor, texts: Sequence[str] = (), needs: frozenset[str] = frozenset()
) -> tuple[Embeddings, Tensor]:
    """(what the tower makes of B pictures and S texts, the tokens of each text that were cut, [S]).

    The features of the texts are `text_BKE[0]`. Without texts that is one row of zeros.
    """
    clean, ids = tower.tokenizer.clean, tower.tokenizer.ids
    slots: list[Text | None] = [Text(ids(clean(text))) for text in texts] or [None]
    empty: list[Text | None] = [None] * len(slots)
    packed = pack([slots, *[empty] * (len(pixels_BCHW) - 1)], tower.tokenizer)
    device = next(tower.parameters()).device
    tokens_T = packed.tokens_T.to(device)
    batch = Batch([""] * len(pixels_BCHW), pixels_BCHW.to(device), tokens_T, *packed[1:])
    found: Embeddings = tower(batch, {"all": slice(None)}, needs)
    return found, packed.dropped_BK[0]
