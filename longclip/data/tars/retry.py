"""Ask again, for so long and no longer; and say why it failed without giving secrets away.

In: a call that may fail, hang or be refused. Out: its result, or a `UserError` of one sentence. Addresses are
shown without user, password and query, and the texts of libraries' errors, which may hold them, never.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ...types import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE = 0.5  # seconds before the second attempt, half of them by chance; doubles with every further one
PATIENT = (408, 425, 429)  # the only answers below 500 that may change when asked again


class Missing(UserError):  # noqa: N818 - it is what the address is
    """There is nothing at this address."""


def insist(url: str, attempt: Callable[[], T], retries: int, seconds: float) -> T:
    """Call until it succeeds, with growing pauses; `url` names it in errors.

    Raises:
        Missing: no such file.
        UserError: refused, or still failing after so many retries or seconds.
    """
    begun = time.monotonic()
    ends, tries = begun + seconds, 0
    while True:
        last, left = tries == retries, max(ends - time.monotonic(), 0.0)
        try:  # an attempt that hangs leaves time for another
            return _within(left if last else left / 2, attempt)
        except Exception as error:
            reason = _reason(url, error)
        tries += 1
        pause = PAUSE * 2 ** (tries - 1) * random.SystemRandom().uniform(0.5, 1.0)
        if last or time.monotonic() + pause >= ends:
            break
        log.debug("%s: %s; again in %.1f s", shown(url), reason, pause)
        time.sleep(pause)
    raise UserError(
        f"{shown(url)} cannot be read: {reason}, after {tries} attempts in {time.monotonic() - begun:.0f} s; "
        "check the server and the network, or raise data.storage.retries and data.storage.deadline, "
        "then go on with resume=auto"
    ) from None


def shown(url: str) -> str:
    """An address for people: without user, password and query, where secrets are."""
    return re.sub(r"://[^/@]*@", "://", url).partition("?")[0] if "://" in url else url


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call, or TimeoutError; a call that hangs is left behind on its thread.

    A thread, because half of fsspec's file systems block and have no time limit of their own.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _reason(url: str, error: Exception) -> str:
    """Why an attempt failed, in words without secrets; raises where another attempt cannot help."""
    if isinstance(error, UserError):
        raise error
    status = _status(error)
    if status == 404:
        raise Missing(f"{shown(url)} does not exist; check the address and the list of shards") from None
    if status is not None and status < 500 and status not in PATIENT:
        raise UserError(
            f"{shown(url)} is refused (status {status}); check the credentials that the protocol's own "
            "library finds in the environment, and whether they have expired"
        ) from None
    if status is not None:
        return f"status {status}"
    if isinstance(error, EOFError):
        return str(error)  # our own words
    if isinstance(error, TimeoutError):
        return "no answer in time"
    code = getattr(error, "errno", None)
    return type(error).__name__ + (f" ({os.strerror(code)})" if code else "")


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, or the one that a missing or forbidden file would have."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return status
        if type(cause).__module__.startswith("aiohttp"):  # fsspec calls a lost connection "not found"
            return None
        cause = cause.__cause__
    if isinstance(error, FileNotFoundError):
        return 404
    return 403 if isinstance(error, PermissionError) else None
