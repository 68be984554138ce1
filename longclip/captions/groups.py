"""The caption groups of a recipe, side by side as K slots: seeded, and the same on every process."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence

from longclip.types import Caption, Ids, Text, UserError

from .policies import Policy


class Groups:
    """The caption groups of a recipe, side by side as K slots.

    Groups that are called the same up to a hyphen ("sub", "sub-wrong") draw alike, so that equal policies in
    them choose the same texts.

    Args:
        groups: a policy by name, in slot order.
        seed: of the run.
        shuffle: show an image's captions in another order each epoch; one order for all groups, so that
            groups which show one caption of several show the same. False when judging.

    Raises:
        UserError: when there are no groups.
    """

    def __init__(self, groups: Mapping[str, Policy], seed: int, shuffle: bool = True) -> None:
        if not groups:
            raise UserError("The recipe has no caption groups; add one under `captions:`.")
        self._policies = dict(groups)
        self._seed = seed
        self._shuffle = shuffle
        self._read: Callable[[str], Ids] | None = None
        self.slots: dict[str, slice] = {}
        self.count = 0
        for name, policy in groups.items():
            self.slots[name] = slice(self.count, self.count + policy.count)
            self.count += policy.count

    def reading(self, read: Callable[[str], Ids]) -> Groups:
        """The same groups, with ids for texts that policies write themselves; `read` is `Tokenizer.ids`."""
        other = copy.copy(self)
        other._read = read
        return other

    def show(
        self, captions: Sequence[Caption], key: str, epoch: int, progress: float = 0.0
    ) -> tuple[Text | None, ...]:
        """K slots for one sample; None where it has no such text.

        The same for equal (seed, epoch, key, progress), whatever the process or worker.

        Args:
            epoch: how often this sample has been shown before.
            progress: the share of the run that is done, from 0 to 1.

        Raises:
            UserError: when the sample has no captions, or some that were never tokenised.
        """
        if not captions:
            raise UserError(f"Sample {key!r} has no captions; remove it from the data or give it one.")
        order = list(captions)
        if self._shuffle and len(order) > 1:
            random.Random(f"{self._seed}/{epoch}/{key}").shuffle(order)
        slots: list[Text | None] = []
        for name, policy in self._policies.items():
            draws = random.Random(f"{self._seed}/{epoch}/{key}/{name.partition('-')[0]}")
            texts = policy(order, draws, progress)
            assert len(texts) <= policy.count, (
                f"group {name} made {len(texts)} texts for {policy.count} slots"
            )
            texts = [text and self._ids(text) for text in texts]
            if not all(text.ids for text in texts if text is not None):
                raise UserError(
                    f"Sample {key!r} has a caption without token ids; run captions.tokenise on it."
                )
            slots += [*texts, *[None] * (policy.count - len(texts))]
        return tuple(slots)

    def _ids(self, text: Text) -> Text:
        if text.words is None:
            return text
        assert self._read is not None, "a policy wrote a text, and these Groups have no tokenizer to read it"
        return text._replace(ids=self._read(text.words))
