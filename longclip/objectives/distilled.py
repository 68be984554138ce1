"""MobileCLIP's distillation: the batch's similarities should spread as they do for a teacher.

In: a caption group, and what teachers made of the same images and captions, carried by side-cars. Out:
divergence between the softmax over teachers' similarities and the one over ours, from images to captions
and back. A vector an image and caption travels; similarities live for one tile of rows.
Local legend: d a teacher's width, which need not be ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.contrastive import check_contrast
from longclip.objectives.imagewise import imagewise
from longclip.objectives.term import Loss, Term
from longclip.types import Embeddings, UserError

CPU_TILE = 2**20
"""Similarities in one tile; about six float32 copies live while it is worked on."""

CUDA_TILE = 2**25
"""A GPU wants few, large kernels; 128 MiB a copy."""


class View(NamedTuple):
    """How one model sees images and their captions: unit vectors and the factor on their cosines."""

    image_BE: Tensor
    text_BKE: Tensor
    scale: Tensor


class Divergence(NamedTuple):
    """Sums over this process's pairs."""

    total: Tensor  # mean of both directions
    agreed: Tensor  # how often both models find the same one first, mean of both directions; no gradient


def divergence(
    student: View, teacher: View, valid_BK: Tensor, gather: Callable[[Tensor], Tensor]
) -> Divergence:
    """How far our softmax over the batch is from a teacher's, images to captions and back, slot by slot.

        L = sum over valid (b, k) of 1/2 [KL(p_bk || q_bk) + KL(p'_bk || q'_bk)]
        q_bk = softmax_j(s v_b . t_jk),  q'_bk = softmax_j(s v_j . t_bk);  p, p' the teacher's, with its own s

    MobileCLIP, Vasu et al. 2024. Over valid j: a pair that the teacher does not know, or whose
    caption is absent, is neither row nor column. Other captions of an image are in slots of their own.
    Not yet divided by the number of pairs. Gradient reaches the student alone.
    """
    teacher = View(*(x.detach() for x in teacher))
    valid_GK, ours, theirs = gather(valid_BK), _of_all(student, gather), _of_all(teacher, gather)
    total, agreed = student.scale.new_zeros(()), student.scale.new_zeros(())
    for k in range(valid_BK.shape[1]):
        image = student.image_BE, teacher.image_BE
        text = student.text_BKE[:, k], teacher.text_BKE[:, k]
        images, texts = (ours.image_BE, theirs.image_BE), (ours.text_BKE[:, k], theirs.text_BKE[:, k])
        valid = valid_BK[:, k], valid_GK[:, k]
        for rows, columns in ((image, texts), (text, images)):
            found_B, same_B = rowwise(rows, columns, valid, (student.scale, teacher.scale))
            total, agreed = total + found_B.sum() / 2, agreed + same_B.sum() / 2
    return Divergence(total, agreed)


Both = tuple[Tensor, Tensor]
"""The student's and the teacher's."""


def rowwise(rows: Both, columns: Both, valid: tuple[Tensor, Tensor], scales: Both) -> Both:
    """Of each row, KL(p || q) over valid columns, and whether p and q are highest at the same one.

    rows, columns: unit vectors. valid: of rows and of columns; the others have 0 and are seen by none.
    """
    valid_B, valid_G = valid
    size = max(1, (CUDA_TILE if valid_G.is_cuda else CPU_TILE) // len(valid_G))
    divergence_B, same_B = imagewise(_tile, (*rows, valid_B), (*columns, valid_G, *scales), size)
    return divergence_B, same_B.detach()


def _tile(
    row_bE: Tensor, taught_bd: Tensor, valid_b: Tensor,
    column_GE: Tensor, taught_Gd: Tensor, valid_G: Tensor,
    scale: Tensor, taught_scale: Tensor,
) -> Both:  # fmt: skip
    q_bG = _log_softmax(scale * row_bE @ column_GE.T, valid_G)
    p_bG = _log_softmax(taught_scale * taught_bd @ taught_Gd.T, valid_G)
    divergence_b = (p_bG.exp() * (p_bG - q_bG)).sum(1)
    same_b = (p_bG.argmax(1) == q_bG.detach().argmax(1)) & valid_b
    return divergence_b.masked_fill(~valid_b, 0), same_b.to(divergence_b.dtype)


def _log_softmax(z_bG: Tensor, valid_G: Tensor) -> Tensor:
    # Not -inf: its difference from another -inf would be NaN, which a probability of 0 does not take away.
    return z_bG.masked_fill(~valid_G, torch.finfo(z_bG.dtype).min).log_softmax(1)


def _of_all(view: View, gather: Callable[[Tensor], Tensor]) -> View:
    return View(gather(view.image_BE), gather(view.text_BKE), view.scale)


@dataclass(frozen=True)
class Teacher:
    """Where side-cars hold what a model made of the same images and captions (`longclip embed` makes them).

    Args:
        image: the column of its image embeddings.
        text: that of its caption embeddings; one for each slot of the group where it has several.
        scale: its own factor on cosines, exp(logit_scale), not ours; what to tune first (MobileCLIP2).
    """

    image: str
    text: str | Sequence[str]
    scale: float

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"A teacher's scale is {self.scale!r}; it is exp(logit_scale), such as 100.")

    @property
    def texts(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)

    def view(self, embeddings: Embeddings, slots: int) -> tuple[View, Tensor]:
        """What it says of this batch, and which captions it knows, [B, slots]. Raises UserError."""
        if len(self.texts) != slots:
            raise UserError(
                f"a teacher has {len(self.texts)} columns of caption embeddings ({', '.join(self.texts)}) "
                f"for a group of {slots} slots; name one for each: text=[COLUMN, ...]"
            )
        columns = {name: embeddings.column(name).float() for name in (self.image, *self.texts)}
        if len({x.shape for x in columns.values()}) > 1 or columns[self.image].ndim != 2:
            shapes = ", ".join(f"{name} {list(x.shape[1:])}" for name, x in columns.items())
            raise UserError(
                f"a teacher's columns are not vectors of one length ({shapes}); name those of one model, as "
                "`longclip embed MODEL SHARDS --out DIR` makes them"
            )
        image_Bd, text_BKd = columns[self.image], torch.stack([columns[name] for name in self.texts], 1)
        known_BK = image_Bd.isfinite().all(-1)[:, None] & text_BKd.isfinite().all(-1)
        image_Bd, text_BKd = (normalize(x.nan_to_num(0), dim=-1) for x in (image_Bd, text_BKd))
        return View(image_Bd, text_BKd, image_Bd.new_tensor(self.scale)), known_BK


class Distilled(Term):
    """Divergence from one or several teachers, whose mean it is.

    The paper's loss is (1 - lambda) of InfoNCE and lambda of this: the weights of two terms. teachers: by
    name. Uses the model's own temperature. Captions must be those that the teachers saw: a group that shows
    one fixed caption of an image, such as `Source`. Measures: `taught`, the share of captions that teachers
    know, and `agreed`, how often both find the same one first.
    """

    def __init__(self, texts: str, teachers: Mapping[str, Teacher], weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        if not teachers:
            raise UserError(f"The term on {texts!r} has no teachers; give it one: teachers: {{NAME: ...}}.")
        self.teachers = dict(teachers)

    @property
    def columns(self) -> dict[str, int | None]:
        return {name: None for teacher in self.teachers.values() for name in (teacher.image, *teacher.texts)}

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, and where columns are missing or do not fit."""
        text_BKE, mask_BK = embeddings.text(self.texts).float(), embeddings.mask(self.texts)
        check_contrast(len(mask_BK) * dist.world())
        student = View(embeddings.image_BE.float(), text_BKE, embeddings.scale.float())
        parts = []
        for teacher in self.teachers.values():
            view, known_BK = teacher.view(embeddings, mask_BK.shape[1])
            parts.append(shared(student, view, mask_BK & known_BK, embeddings))
        value, agreed, taught = torch.stack([torch.stack(part) for part in parts]).mean(0)
        present = embeddings.all_mask(self.texts).sum().clamp_min(1)
        return Loss(value, {"taught": taught.detach() / present, "agreed": agreed.detach()})


def shared(student: View, teacher: View, valid_BK: Tensor, embeddings: Embeddings) -> tuple[Tensor, ...]:
    """This process's share of the mean divergence and agreement, and the number of pairs of all processes."""
    found = divergence(student, teacher, valid_BK, embeddings.gather)
    pairs = embeddings.gather(valid_BK).sum()
    share = dist.world() / pairs.clamp_min(1)
    return found.total * share, found.agreed * share, pairs.to(share)
