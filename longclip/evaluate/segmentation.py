"""Zero-shot segmentation: mIoU of the classes whose names patches fit best.

In: a tower, pictures with masks (`masks`), class names. Out: miou, mean_accuracy (over classes) and
pixel_accuracy, in percent, over all pictures together, as mmsegmentation's `IoUMetric` has them. Pixels of
255 count nowhere, and neither does a class that no mask has and nobody predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..towers.dense import check_attention
from ..types import UserError
from .classification import classifier, templates_of
from .judging import Each, Findings, Judged
from .masks import IGNORED, Masks, Scene
from .sharing import collect, share
from .showing import protocol_id
from .sliding import Background, Windows, decide, similarities

if TYPE_CHECKING:
    from ..towers.clip import DualTower


@dataclass(frozen=True)
class Segmentation:
    """Zero-shot segmentation of a folder of pictures with masks.

    Args:
        root: the folder of the set.
        masks: how it lies there.
        classes: names in the order of their numbers; several names of a class are divided by ", ".
        templates: see `Classification`.
        protocol: id of the set and its names, see `protocol_id`; attention and windows are added to it.
        expected: pictures that the published set has; None takes what there is.
        keys: SHA-256 of the published keys, sorted, one a line; None tells the digest and checks nothing.
        attention: of the last block, one of `towers.dense.ATTENTIONS`.
        windows: what of a picture is looked at, and at which size.
        background: when a pixel is class 0 after all.
    """

    root: str
    masks: Masks
    classes: Sequence[str]
    templates: str | Sequence[str] = "openai"
    protocol: str = ""
    expected: int | None = None
    keys: str | None = None
    attention: str = "plain"
    windows: Windows = Windows()  # noqa: RUF009 - a tuple
    background: Background = Background()  # noqa: RUF009

    def __call__(self, tower: DualTower, data: Judged) -> Findings:
        check_attention(tower.backbone.visual, self.attention)
        sizes, scenes = self.windows.of(tower), self.masks.read(self.root, self.expected, self.keys)
        names = [name.split(", ") for name in self.classes]
        prompts = templates_of(self.templates)
        query_QE, _ = classifier(tower, [name for own in names for name in own], prompts)
        class_Q = torch.tensor([number for number, own in enumerate(names) for _ in own])
        counts = []
        for scene in share(scenes):
            label_HW = self._labels(scene)
            cosine_QHW = similarities(tower, scene.picture(), query_QE, sizes, self.attention)
            height, width = label_HW.shape
            predicted_HW = decide(cosine_QHW, class_Q, (height, width), self.background)
            counts.append(counted(predicted_HW.cpu(), label_HW, len(names))[None])
        protocol = protocol_id(self.protocol, self.expected, self.attention, "-".join(map(str, sizes)))
        return _findings(collect(counts, len(scenes)), [own[0] for own in names], protocol)

    def _labels(self, scene: Scene) -> Tensor:
        label_HW = self.masks.labels(scene.mask())
        highest = int(label_HW.masked_fill(label_HW == IGNORED, -1).max())
        if highest >= len(self.classes):
            raise UserError(
                f"{scene.place.path} has class {highest}, and there are names for 0 to "
                f"{len(self.classes) - 1}; give a name for every class, or set masks.zero_is_nothing=true"
            )
        return label_HW


def counted(predicted_HW: Tensor, label_HW: Tensor, classes: int) -> Tensor:
    """Pixels of each class, [3, classes] int64: predicted and labelled so, predicted so, labelled so.

    >>> counted(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, IGNORED]]), 2).tolist()
    [[1, 0], [1, 1], [2, 0]]
    """
    known_HW = label_HW != IGNORED
    predicted_X, label_X = predicted_HW[known_HW], label_HW[known_HW]
    groups = (label_X[predicted_X == label_X], predicted_X, label_X)
    return torch.stack([group.bincount(minlength=classes) for group in groups])


def _findings(count_N3C: Tensor, names: Sequence[str], protocol: str) -> Findings:
    both_C, predicted_C, labelled_C = count_N3C.sum(0).double()
    if not labelled_C.any():
        raise UserError("no mask has a pixel that counts: see masks.zero_is_nothing")
    union_C = predicted_C + labelled_C - both_C
    each = {
        "miou": _by_class(names, both_C, union_C),
        "mean_accuracy": _by_class(names, both_C, labelled_C),
    }
    numbers = {name: sum(found.values) / len(found.values) for name, found in each.items()}
    numbers["pixel_accuracy"] = 100 * float(both_C.sum() / labelled_C.sum())
    facts = {"classes": float(len(names)), "pictures": float(len(count_N3C))}
    return Findings(numbers | facts, protocol, each)


def _by_class(names: Sequence[str], part_C: Tensor, whole_C: Tensor) -> Each:
    present = whole_C.nonzero()[:, 0].tolist()
    keys = [f"{number} {names[number]}" for number in present]
    return Each(keys, (100 * part_C[present] / whole_C[present]).tolist())
