"""State dicts under open_clip's own names, however parameters are held while they train.

In: tensors of a model whose position table may be split (`positions`) and whose matrices may be adapted
(`lora`). Out: those of the plain model that computes the same. Nothing outside training sees anything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .lora import merge_matrices
from .positions import merge_tables


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that open_clip's model of the same configuration loads."""
    return merge_matrices(merge_tables(state))


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The same of a model."""
    return merged(model.state_dict())
