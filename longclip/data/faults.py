"""What is wrong with single samples, counted, so that nothing is lost unseen.

In: `Damaged` samples, wherever they are found. Out: counts by reason over all processes, the same on each
of them, and an end to the run where they are more than a ceiling allows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import StrEnum

from .. import dist
from ..types import Skip, UserError

log = logging.getLogger(__name__)

GRACE = 10_000  # samples: below so many, one damaged sample is no share of anything
TOLD = 100  # damaged samples that one process names in its log, each once


class Reason(StrEnum):
    """Every way in which a sample can be unusable."""

    CUT = "shard is cut short"
    BYTES = "bytes are not those of the index"
    MEMBER = "member is missing or broken"
    JSON = "JSON has the wrong shape"
    IMAGE = "image cannot be decoded"
    LARGE = "image is too large"
    CAPTION = "caption is missing or empty"
    TWICE = "key comes twice"
    VECTOR = "stored features are missing or not finite"


class Damaged(UserError):  # noqa: N818 - it is what the sample is
    """A sample that cannot be used; the other samples can."""

    def __init__(self, text: str, reason: Reason) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Damaged], tuple[str, Reason]]:
        return Damaged, (str(self), self.reason)


class Ledger:
    """How many samples were seen and left out since the start of this program.

    Args:
        max_share: of the samples seen; more damaged ones stop the run.

    Attributes:
        size: of the training set, where it is known: small sets are judged before `GRACE` samples.
    """

    def __init__(self, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise UserError(f"data.max_faults is {max_share}; it is a share of the samples, from 0 to 1")
        self.max_share, self.size = max_share, GRACE
        self._here = [0] * (1 + len(Reason))  # seen, and every reason in order, by this process
        self._all = self._here
        self._told: set[str] = set()
        self._last = ""

    def add(self, seen: int, skips: Sequence[Skip]) -> None:
        """What this process saw in one step; damaged samples are named in the log."""
        found = [skip.reason for skip in skips]
        new = [seen, *(found.count(reason) for reason in Reason)]
        self._here = [a + b for a, b in zip(self._here, new, strict=True)]
        for skip in skips:
            self._last = skip.text
            if skip.text not in self._told and len(self._told) < TOLD:
                self._told.add(skip.text)
                log.warning("another is shown in its place: %s", skip.text)

    def judge(self) -> None:
        """Add up what all processes saw; every one of them must call it, at the same step.

        Raises:
            UserError: the ceiling is passed; on all processes at once.
        """
        self._all = dist.total(self._here)
        if self.skipped > self.max_share * max(self._all[0], min(self.size, GRACE)):
            last = f"; the last one here: {self._last}" if self._last else ""
            raise UserError(
                f"{self.summary()}: more than data.max_faults={self.max_share:g} allows{last}. "
                "Mend the shards or raise data.max_faults, then go on with resume=auto"
            )

    @property
    def skipped(self) -> int:
        return sum(self._all[1:])

    def measures(self) -> dict[str, float]:
        """What a logger gets: all, and every reason that came up."""
        counts = zip(Reason, self._all[1:], strict=True)
        by_reason = {f"data/skipped/{reason.name.lower()}": float(n) for reason, n in counts if n}
        return {"data/skipped": float(self.skipped), **by_reason}

    def summary(self) -> str:
        """How many were left out, and why."""
        counts = zip(Reason, self._all[1:], strict=True)
        found = ", ".join(f"{n:,} x {reason}" for reason, n in counts if n)
        what = f"{self.skipped:,} of {self._all[0]:,} samples could not be used, others were shown instead"
        return f"{what} ({found})" if found else f"all of {self._all[0]:,} samples could be used"
