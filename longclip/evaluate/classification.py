"""Zero-shot classification: which of a set's class names fits a picture best.

In: a tower, a folder of labelled pictures (`labelled`), class names, prompt templates. Out: top1, top5 and
mean_per_class (recall), in percent.

A class is the mean of the L2-normalised features of its prompts, normalised again, as open_clip's
`build_zero_shot_classifier` makes it. A wrong class that ties with the right one counts against the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from ..metrics import cosine
from ..towers.asking import ask
from ..types import UserError
from .judging import Each, Findings, Judged
from .labelled import READERS, Item, Labelled
from .sharing import collect, share
from .showing import (
    check_keys,
    check_whole,
    pixel_batches,
    protocol_id,
    text_features,
    transform_for,
)

if TYPE_CHECKING:
    from ..towers.clip import DualTower

Template = Callable[[str], str]
TEMPLATES: dict[str, Sequence[Template]] = {
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
}


@dataclass(frozen=True)
class Classification:
    """Zero-shot classification of a folder of labelled pictures.

    Args:
        root: the folder of the set.
        layout: how it lies there: "folders", "cifar" or "webdataset", see `labelled`.
        folder: which part of it is judged, such as "val"; CIFAR's files say it themselves.
        protocol: id of what is judged and how, see `protocol_id`.
        expected: pictures that the published set has; None takes what there is.
        keys: SHA-256 of the published keys, sorted, one a line; None tells the digest and checks nothing.
        names: of the classes, by label; "imagenet": open_clip's 1000; None: as the set says.
        templates: prompts with {} or {c} for the name; "openai": the 80, "simple": the 7 of them; None: those
            that the set brings, else the 80.
        resize_mode: "shortest" (crop) or "squash"; None: the model's own.
        batch_size: pictures encoded at once.
    """

    root: str
    layout: str
    folder: str = ""
    protocol: str = ""
    expected: int | None = None
    keys: str | None = None
    names: str | Sequence[str] | None = None
    templates: str | Sequence[str] | None = None
    resize_mode: str | None = None
    batch_size: int = 128

    def __call__(self, tower: DualTower, data: Judged) -> Findings:
        found = self._read()
        names = self._names(found)
        prompts = templates_of(self.templates or found.templates or "openai")
        class_CE, cut = classifier(tower, names, prompts)
        place_N = self._places(tower, found.items, class_CE, names)
        classes = {"classes": len(names), "pictures": len(place_N), "truncated": cut}
        protocol = protocol_id(self.protocol, self.expected, self.resize_mode)
        return _findings(found.items, names, place_N, classes, protocol)

    def _read(self) -> Labelled:
        if self.layout not in READERS:
            raise UserError(f"layout is one of {', '.join(READERS)}; got {self.layout!r}")
        found = READERS[self.layout](self.root, self.folder)
        check_whole(self.root, "pictures", len(found.items), self.expected, ())
        check_keys(self.root, (item.key for item in found.items), self.keys if self.expected else None)
        return found

    def _names(self, found: Labelled) -> list[str]:
        given = open_clip.IMAGENET_CLASSNAMES if self.names == "imagenet" else self.names
        names = found.names if given is None else [given] if isinstance(given, str) else list(given)
        labels = {item.label for item in found.items}
        if max(labels) >= len(names) or (given is not None and len(found.names) != len(names)):
            raise UserError(
                f"{self.root}: expected {len(names)} classes, as many as there are names, found "
                f"{len(found.names)} with labels up to {max(labels)}; get the set again, or give names=[...]"
            )
        return names

    def _places(
        self, tower: DualTower, items: Sequence[Item], class_CE: Tensor, names: Sequence[str]
    ) -> Tensor:
        batches = [items[at : at + self.batch_size] for at in range(0, len(items), self.batch_size)]
        own, spared_CC = list(share(batches)), _namesakes(names)
        loads = [[item.load for item in batch] for batch in own]
        places = []
        for batch, pixels_BCHW in zip(
            own, pixel_batches(loads, transform_for(tower, self.resize_mode)), strict=True
        ):
            image_BE = ask(tower, pixels_BCHW)[0].image_BE.cpu()
            label_B = torch.tensor([item.label for item in batch])
            places.append(places_of(image_BE, class_CE, label_B, spared_CC))
        return collect(places, len(batches))


def classifier(tower: DualTower, names: Sequence[str], templates: Sequence[Template]) -> tuple[Tensor, float]:
    """(class_CE on the host, the percentage of prompts that the context length cut)."""
    distinct = list(dict.fromkeys(names))  # a name that comes twice must not differ in its last bit
    prompts = [template(name) for name in distinct for template in templates]
    text_SE, cut_S = text_features(tower, prompts)
    mean_UE = text_SE.unflatten(0, (len(distinct), len(templates))).mean(1)
    places = [distinct.index(name) for name in names]
    return F.normalize(mean_UE, dim=-1)[places], 100 * float(cut_S.float().mean())


def templates_of(given: str | Sequence[str]) -> Sequence[Template]:
    """Templates by name, or texts with {} or {c} where the class name goes.

    Raises:
        UserError: no such name, or a text without a place for the name.
    """
    if isinstance(given, str):
        if given not in TEMPLATES:
            raise UserError(f"templates is {' or '.join(TEMPLATES)}, or a list of texts; got {given!r}")
        return TEMPLATES[given]
    odd = [text for text in given if "{}" not in text and "{c}" not in text]
    if odd or not given:
        raise UserError(
            f"a template has {{}} or {{c}} where the class name goes; got {odd[0] if odd else given!r}"
        )
    return [_template(text) for text in given]


def _template(text: str) -> Template:
    return lambda name: text.replace("{c}", name).replace("{}", name)


def places_of(image_BE: Tensor, class_CE: Tensor, label_B: Tensor, spared_CC: Tensor) -> Tensor:
    """The place of the right class among all, [B], 1 = first; ties count against it, but for `spared_CC`."""
    score_BC = cosine(image_BE, class_CE)
    right_B1 = score_BC.gather(1, label_B[:, None])
    ahead_BC = (score_BC >= right_B1) & ~spared_CC[label_B]
    return 1 + ahead_BC.sum(1)


def _namesakes(names: Sequence[str]) -> Tensor:
    """Which classes never stand in a class's way, [C, C]: itself, and later ones of the very same name.

    open_clip's list has "missile" and "sunglasses" twice. A model cannot tell them apart, and an argmax takes
    the first: so does this.
    """
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    name_C = torch.tensor([number[name] for name in names])
    return (name_C[:, None] == name_C).triu()


def _findings(
    items: Sequence[Item], names: Sequence[str], place_N: Tensor, facts: dict[str, float], protocol: str
) -> Findings:
    keys, label_N = [item.key for item in items], torch.tensor([item.label for item in items])
    each = {
        f"top{k}": Each(keys, (100.0 * (place_N <= k)).tolist()) for k in (1, 5) if k == 1 or len(names) > 5
    }
    first_N = (place_N == 1).double()
    present = label_N.unique().tolist()
    recalls = [100 * float(first_N[label_N == label].mean()) for label in present]
    each["mean_per_class"] = Each([f"{label} {names[label]}" for label in present], recalls)
    numbers = {name: sum(found.values) / len(found.values) for name, found in each.items()}
    return Findings({**numbers, "chance": 100 / len(names), **facts}, protocol, each)
