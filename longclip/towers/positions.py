"""Text position tables: longer ones from shorter ones, and rows that never move.

In goes a table [L, D] as it was trained, out comes one for a longer context: `stretch` keeps what the
first rows know (Long-CLIP), `interpolate` is what open_clip does, `group` and `repeat` make no row that was
never trained (LongEmbed), which is for models that are not trained again. `freeze_head` splits the table that
a text tower holds into a frozen head and a trainable tail, and `merge_tables` joins them again under
open_clip's own name, so that nothing outside ever sees two tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..types import UserError

METHODS = ("stretch", "interpolate", "group", "repeat")
_NAME = "positional_embedding"
_HEAD = f"parametrizations.{_NAME}.original0"
_TAIL = f"parametrizations.{_NAME}.original1"


def stretch(table_LD: Tensor, keep: int, ratio: int) -> Tensor:
    """Long-CLIP's knowledge-preserving stretch (Zhang et al., ECCV 2024, section 3.1), in closed form.

    The first `keep` rows stay. Behind them every row i is followed by ratio - 1 rows on the line from
    E[i] to E[i + 1]; the last row has no successor and goes on along the line from E[L - 2]:

        E'[p] = E[i] + k / ratio * (E[i + 1] - E[i])    with p - keep = ratio * (i - keep) + k

    Computed in float32 whatever the table's type. Returns float32 [keep + ratio * (L - keep), D].
    """
    base = table_LD.shape[0]
    assert 0 <= keep < base, f"keep must leave rows to stretch: keep {keep} of {base} rows"
    assert base >= 2, "the last row is extrapolated from two"
    assert ratio >= 1, f"ratio must be a positive whole number, not {ratio}"
    source_LD = table_LD.detach().float()
    step_LD = torch.diff(source_LD, dim=0)
    step_LD = torch.cat([step_LD, step_LD[-1:]])
    offset_N = torch.arange(ratio * (base - keep), device=source_LD.device)
    row_N = keep + offset_N // ratio
    share_N1 = ((offset_N % ratio).float() / ratio)[:, None]
    return torch.cat([source_LD[:keep], source_LD[row_N] + share_N1 * step_LD[row_N]])


def interpolate(table_LD: Tensor, length: int) -> Tensor:
    """Plain linear resampling of all rows (align_corners=False), which is what open_clip does unasked.

    Moves the first rows too, so knowledge about short texts is blurred. Returns float32 [length, D].
    """
    channels_1DL = table_LD.detach().float().T[None]
    return nn.functional.interpolate(channels_1DL, size=length, mode="linear", align_corners=False)[
        0
    ].T.contiguous()


def group(table_LD: Tensor, length: int, keep: int = 0) -> Tensor:
    """Neighbours share a position (LongEmbed, Zhu et al. 2024, arXiv 2404.12096, "grouped positions").

        E'[p] = E[keep + floor((p - keep) (L - keep) / (length - keep))],   p >= keep

    The first `keep` rows stay, none in the paper. Returns float32 [length, D].
    """
    rows = table_LD.shape[0] - keep
    later_N = torch.arange(length - keep, device=table_LD.device) * rows // (length - keep)
    return _picked(table_LD, keep, later_N)


def repeat(table_LD: Tensor, length: int, keep: int = 0) -> Tensor:
    """Positions begin anew (LongEmbed, "recurrent positions"): a text of at most L tokens is as it was.

        E'[p] = E[keep + (p - keep) mod (L - keep)],   p >= keep

    The first `keep` rows are not repeated; the paper repeats all. Returns float32 [length, D].
    """
    later_N = torch.arange(length - keep, device=table_LD.device) % (table_LD.shape[0] - keep)
    return _picked(table_LD, keep, later_N)


def _picked(table_LD: Tensor, keep: int, later_N: Tensor) -> Tensor:
    source_LD = table_LD.detach().float()
    return torch.cat([source_LD[:keep], source_LD[keep + later_N]])


def resize(table_LD: Tensor, length: int, method: str = "stretch", keep: int = 20) -> Tensor:
    """A table of exactly `length` rows: [L, D] -> float32 [length, D]; the same rows where length is L.

    `keep` first rows stay as they are, but by `interpolate`. Raises UserError for a shorter length
    (positions are never cut silently), for a length that the stretch cannot give, for a `keep` that leaves
    nothing, and for an unknown method.
    """
    base = table_LD.shape[0]
    if method not in METHODS:
        raise UserError(f"positions={method!r} is not known: choose one of {', '.join(METHODS)}.")
    if length < base:
        raise UserError(
            f"context_length {length} is shorter than the {base} positions of these weights, and positions "
            f"are never cut: use context_length={base} or a longer one."
        )
    if length == base:
        return table_LD.detach().float().clone()
    if method == "interpolate":
        return interpolate(table_LD, length)
    if not 0 <= keep < base:
        raise UserError(
            f"keep={keep} leaves nothing to stretch in a table of {base} rows: use 0 to {base - 1}."
        )
    if method == "stretch":
        return stretch(table_LD, keep, _ratio(base, length, keep))
    return (group if method == "group" else repeat)(table_LD, length, keep)


def _ratio(base: int, length: int, keep: int) -> int:
    """The whole number r with keep + r * (base - keep) == length. Raises UserError if there is none."""
    ratio, rest = divmod(length - keep, base - keep)
    if rest:
        below, above = (f"{keep + r * (base - keep)} (ratio {r})" for r in (ratio, ratio + 1))
        raise UserError(
            f"context_length {length} is not one that the stretch gives: keep {keep} rows and take the other "
            f"{base - keep} a whole number of times; the nearest lengths are {below} and {above}. Choose one "
            f"of them, another keep, or positions=interpolate."
        )
    return ratio


def text_module(model: nn.Module) -> nn.Module:
    """The module that owns the text position table: open_clip's CLIP itself, or CustomTextCLIP's `text`.

    Raises UserError where there is no such table (text towers of the transformers library).
    """
    for module in (model, getattr(model, "text", None)):
        # Asked of the registries: reading the attribute of a split table would join it each time.
        if isinstance(module, nn.Module) and (
            _NAME in module._parameters or parametrize.is_parametrized(module, _NAME)
        ):
            return module
    raise UserError(
        "this text tower has no position table of open_clip's own (it comes from the transformers library), "
        "so its positions can be neither stretched nor frozen: choose an architecture without hf_model_name."
    )


class _HeadAndTail(nn.Module):
    """One table seen as two parameters: [keep, D] and [L - keep, D]."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, head: Tensor, tail: Tensor) -> Tensor:
        return torch.cat([head, tail])

    def right_inverse(self, table: Tensor) -> tuple[Tensor, Tensor]:
        # Clones: two views of one storage would be saved, copied and moved as one.
        return table[: self.keep].detach().clone(), table[self.keep :].detach().clone()


def freeze_head(module: nn.Module, keep: int) -> None:
    """Freeze the first `keep` rows of `module.positional_embedding`, in place; the other rows train.

    The attribute stays the whole table, so open_clip's own forward needs no change. The head is a
    parameter without gradient: no optimiser moves or decays it. Call before the optimiser is made, and
    with `text_module(model)`. Raises UserError where `keep` leaves no row on either side.
    """
    rows = getattr(module, _NAME).shape[0]
    if not 0 < keep < rows:
        raise UserError(f"keep={keep} cannot freeze a part of {rows} position rows: use 1 to {rows - 1}.")
    parametrize.register_parametrization(module, _NAME, _HeadAndTail(keep))
    module.get_parameter(_HEAD).requires_grad_(False)


def merge_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under open_clip's own names: a split position table becomes one tensor again."""
    merged = dict(state)
    for name in [name for name in state if name.endswith(_HEAD)]:
        prefix = name.removesuffix(_HEAD)
        merged[prefix + _NAME] = torch.cat([merged.pop(name), merged.pop(prefix + _TAIL)])
    return merged
