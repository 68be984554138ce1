"""Zero-shot retrieval of an evaluation set, under one or several views of its captions.

Both directions, float32 scores, and a wrong item that ties with the right one counts against the model
(`metrics.places`). How long the texts are, and how many the context length cuts, is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import metrics
from ..captions import Groups, Policy, Whole
from ..metrics import Places, Score
from ..tokens import Tokenizer
from ..types import UserError
from .features import Features, Shown, features
from .judging import Each, Findings, Judged, Ranked, Split, batches, protocol
from .late import Interaction, check_late
from .sharing import collect, share

QUERIES = 1024  # ranked at a time: what processes share


@dataclass(frozen=True)
class Retrieval:
    """Retrieval of one set, under one or several views of its captions in one pass.

    Of every view: `metrics.summary` of both directions; `tokens` and `tokens_max`, the mean and greatest
    length of its texts before any cut; `truncated`, the percentage of them that the context length cuts.

    Args:
        split: which evaluation set, of the run or a `sets.PairSet`.
        views: name -> caption policy. Results are named `view/i2t_r1` and so on.
        batch_size: images encoded at once.
        scoring: "global", the cosine of two features; or "late", between patches and words as FILIP has it,
            image to text by the mean over patches and text to image by that over words: for models trained
            so (`recipe=filip`). That is another protocol, and its id ends in "late".
    """

    split: Split
    views: Mapping[str, Policy] = field(default_factory=lambda: {"long": Whole()})
    batch_size: int = 128
    scoring: str = "global"

    def __post_init__(self) -> None:
        if self.scoring not in ("global", "late"):
            raise UserError(f'scoring is {self.scoring!r}; choose "global" or "late"')

    def __call__(self, tower: Any, data: Judged) -> Findings:
        groups = Groups(self.views, seed=0, shuffle=False)
        shown = batches(self.split, tower, data, self.batch_size, groups)
        if self.scoring == "late":
            check_late(tower)
        found = features(tower, shown, fine=self.scoring == "late")
        numbers, each, ranked = dict[str, float](), dict[str, Each](), dict[str, Ranked]()
        for view, slot in groups.slots.items():
            if not found.mask(slot).any():
                raise UserError(f"{self.split} has no caption for the view {view!r}: nothing to retrieve")
            ways = search(found, slot)
            scores = metrics.summary({way: places.rank_N for way, places in ways.items()})
            numbers |= {f"{view}/{name}": value for name, value in (scores | lengths(found, slot)).items()}
            each |= {f"{view}/{name}": value for name, value in hits(found, slot, ways).items()}
            ranked[view] = in_full(found, slot, ways, tower.tokenizer, shown.picture)
        judged_by = protocol(self.split)
        if judged_by and self.scoring == "late":
            judged_by += "/late"
        return Findings(numbers, judged_by, each, ranked)


def search(found: Features, slot: slice) -> dict[str, Places]:
    """Where every query of a view ends up, by direction; each process ranks some of the queries.

    By late interaction where the features have patches and words, else by cosine.
    """
    mask_NK, device = found.mask(slot), found.image_NE.device
    text_ME = found.text_NKE[:, slot][mask_NK.to(device)]
    owner_M = mask_NK.nonzero()[:, 0].to(device)
    ways = metrics.directions(found.image_NE, text_ME, owner_M)
    if found.patches_NPE is None:
        scores = {way: metrics.by_cosine(query, item) for way, (query, item, _, _) in ways.items()}
    else:
        late = Interaction(found, slot)
        scores = {"i2t": late.of_images(owner_M.unique()), "t2i": late.of_texts}
    return {way: _shared(scores[way], *owners) for way, (_, _, *owners) in ways.items()}


def _shared(score: Score, query_owner_N: Tensor, item_owner_M: Tensor) -> Places:
    starts = range(0, len(query_owner_N), QUERIES)
    parts = [
        metrics.placed(score, query_owner_N[first : first + QUERIES], item_owner_M, first=first)
        for first in share(starts)
    ]
    return Places(*(collect(list(of_chunks), len(starts)) for of_chunks in zip(*parts, strict=True)))


def lengths(found: Features, slot: slice) -> dict[str, float]:
    """How long the texts of a view are, in tokens with start and end, and how many are cut."""
    mask_NK = found.mask(slot)
    dropped_M = found.dropped_NK[:, slot][mask_NK].double()
    tokens_M = found.lengths_NK[:, slot][mask_NK].double() + dropped_M
    return {
        "tokens": float(tokens_M.mean()),
        "tokens_max": float(tokens_M.max()),
        "truncated": 100 * float((dropped_M > 0).double().mean()),
    }


def hits(found: Features, slot: slice, ways: Mapping[str, Places]) -> dict[str, Each]:
    """What each recall is the mean of: 100 or 0 for every query, an image's key or a text's `KEY#SLOT`."""
    owner_M, place_M = (part.tolist() for part in found.mask(slot).nonzero().unbind(1))
    asked = {
        "i2t": [found.keys[n] for n in dict.fromkeys(owner_M)],
        "t2i": [f"{found.keys[n]}#{k}" for n, k in zip(owner_M, place_M, strict=True)],
    }
    return {
        f"{way}_r{k}": Each(asked[way], (100.0 * (places.rank_N <= k)).tolist())
        for way, places in ways.items()
        for k in metrics.CUTOFFS
    }


def in_full(
    found: Features,
    slot: slice,
    ways: Mapping[str, Places],
    tokenizer: Tokenizer,
    picture: Callable[[int], bytes],
) -> Ranked:
    """Everything that a gallery shows of a view."""
    owner_M = found.mask(slot).nonzero()[:, 0]
    return Ranked(
        images=found.keys,
        texts=Shown(found, slot, tokenizer),
        owners=owner_M.tolist(),
        asked=owner_M.unique().tolist(),
        i2t_ranks=ways["i2t"].rank_N.tolist(),
        i2t_first=ways["i2t"].rival_N.tolist(),
        t2i_ranks=ways["t2i"].rank_N.tolist(),
        t2i_first=ways["t2i"].rival_N.tolist(),
        picture=picture,
    )
