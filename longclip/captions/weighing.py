"""How much a caption counts, by its score: seen by the sampler, or by losses that read weights.

In: the captions of one image, a seeded source of randomness. Out: the texts of another policy, with weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longclip.types import Caption, Text, UserError

from .policies import Policy


@dataclass(frozen=True)
class Scored:
    """The texts of `policy`, each with a weight from the score of the caption that it comes from.

    The weight rises linearly from 0 for a score of `low` and below to 1 for one of `high` and above; a
    caption without score counts as 1. Captions of weight 0 are never shown. `policy` sees one caption after
    another, in the order in which they are shown, until there are enough texts. A text that an earlier
    caption has said leaves its slot empty: twice the same would be a false negative.

    Args:
        policy: chooses among the texts of one caption.
        low, high: scores, such as 0.15 and 0.3 for cosines of CLIP.
        draw: for the sampler instead: captions are drawn without replacement with probabilities like their
            weights, and then all count as 1. Weighed twice, a caption would count by the weight's square.
    """

    policy: Policy
    low: float
    high: float
    draw: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(
                f"Scored.low is {self.low} and Scored.high {self.high}; captions have weight 0 up to a score "
                "of low, and 1 from one of high on, so low must be the smaller one."
            )

    @property
    def count(self) -> int:
        return self.policy.count

    def __call__(
        self, captions: Sequence[Caption], rng: random.Random, progress: float = 0.0
    ) -> list[Text | None]:
        weighed = [(self._weight(caption), caption) for caption in captions]
        weighed = [(weight, caption) for weight, caption in weighed if weight > 0]
        if self.draw:
            # The largest of u^(1/w) are a draw without replacement by w (Efraimidis and Spirakis 2006).
            keyed = [(rng.random() ** (1 / weight), caption) for weight, caption in weighed]
            weighed = [(1.0, caption) for _, caption in sorted(keyed, key=lambda pair: -pair[0])]
        texts: list[Text | None] = []
        for weight, caption in weighed:
            if len(texts) < self.count:
                shown = {_content(text) for text in texts if text}
                found = [
                    text and text._replace(weight=text.weight * weight)
                    for text in self.policy([caption], rng, progress)
                ]
                texts += [text if text and _content(text) not in shown else None for text in found]
        return texts[: self.count]

    def _weight(self, caption: Caption) -> float:
        if caption.score is None:
            return 1.0
        return min(1.0, max(0.0, (caption.score - self.low) / (self.high - self.low)))


def _content(text: Text) -> tuple[bytes, str | None]:
    return text.ids.tobytes(), text.words
