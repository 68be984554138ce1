"""Compositional accuracy: does an image fit what is said of it better than the same with one thing wrong?

In: an evaluation set with captions, whoever wrote them. Out: for each kind of swap (`captions.Contrasted`)
the share of images whose sentence scores strictly above its swapped one, in percent; chance is 50. It needs
no files beside the captions; its negatives are rule-made and in English, and published sets such as
conf/benchmark/sugarcrepe.yaml remain the ones to compare with others by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..captions import Contrasted, Groups
from ..captions.lexicon import load
from ..captions.policies import Sources
from ..tokens import Tokenizer
from ..types import UserError
from .features import Features, Shown, features
from .judging import Each, Findings, Judged, Split, batches, protocol


@dataclass(frozen=True)
class Swaps:
    """Right against swapped: `accuracy`, the mean over kinds; that of each kind; and the number of `pairs`.

    Two texts that the model is shown alike, as the context length cuts off what differs, count against it.

    Args:
        split: which evaluation set, of the run or a `sets.PairSet`.
        kinds: of the lexicon, and "order"; None: all that the captions have.
        whole: the whole caption with one thing swapped instead of one sentence of it.
        source: which caption of an image; None: its first.
        lexicon: a YAML file of one's own, as in `captions.Swapped`.
        batch_size: images encoded at once.
    """

    split: Split
    kinds: Sequence[str] | None = None
    whole: bool = False
    source: Sources = None
    lexicon: str | None = None
    batch_size: int = 128

    def __call__(self, tower: Any, data: Judged) -> Findings:
        policies = {
            kind: Contrasted(kind, self.whole, self.source, self.lexicon)
            for kind in self.kinds or load(self.lexicon).kinds
        }
        groups = Groups(policies, seed=0, shuffle=False)
        found = features(tower, batches(self.split, tower, data, self.batch_size, groups))
        each = {kind: _answers(found, groups.slots[kind], tower.tokenizer) for kind in policies}
        each = {kind: answers for kind, answers in each.items() if answers.keys}
        if not each:
            raise UserError(
                f"no caption of {self.split} names anything that could be swapped ({', '.join(policies)}): "
                "judge it without swaps, or give a lexicon of its language (the shipped one is English)"
            )
        by_kind = {kind: sum(answers.values) / len(answers.values) for kind, answers in each.items()}
        numbers = {
            "accuracy": sum(by_kind.values()) / len(by_kind),
            **by_kind,
            "pairs": float(sum(len(answers.keys) for answers in each.values())),
        }
        return Findings(numbers, protocol(self.split), each)


def _answers(found: Features, slot: slice, tokenizer: Tokenizer) -> Each:
    """Of every image that has both texts: 100 where the right one wins, 0 where it loses or they tie."""
    row_Q = found.mask(slot).all(1).nonzero()[:, 0]
    there_Q = row_Q.to(found.image_NE.device)
    pair_Q2E = found.text_NKE[there_Q][:, slot].double()
    right_Q, wrong_Q = torch.einsum("qe,qke->kq", found.image_NE[there_Q].double(), pair_Q2E).float().cpu()
    shown = Shown(found, slot, tokenizer)
    cut_Q = found.dropped_NK[row_Q][:, slot].bool().any(1).tolist()
    alike_Q = [cut and shown[2 * q] == shown[2 * q + 1] for q, cut in enumerate(cut_Q)]
    won_Q = (right_Q > wrong_Q) & ~torch.tensor(alike_Q, dtype=torch.bool)
    return Each([found.keys[row] for row in row_Q.tolist()], (100.0 * won_Q).tolist())
