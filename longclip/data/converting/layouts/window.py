"""A JSON text too long for memory, value by value.

In: a binary stream. Out: its next value, decoded from the part of the text that is needed for it.
"""

from __future__ import annotations

import codecs
import json
from typing import IO

from ....types import UserError

LONGEST = 64 * 2**20  # bytes of one value: longer ones are a mistake or an attack
CHUNK = 2**20
NO_JSON = (ValueError, RecursionError)


class Window:
    """The part of a JSON text that is needed for the next value."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._text, self._at, self.read = stream, "", 0, 0
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or not self._more(CHUNK):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        self._at += 1

    def value(self, name: str, number: int, longest: int = LONGEST) -> object:
        """The value that begins here.

        Raises:
            UserError: it is no JSON, or longer than it may be; the rest of the text cannot be trusted then.
        """
        self.peek()
        chunk = CHUNK
        while True:
            try:
                found, self._at = self._decoder.raw_decode(self._text, self._at)
                return found
            except NO_JSON as error:
                whole = len(self._text) - self._at > longest or not self._more(chunk)
                if whole:
                    raise UserError(
                        f"{name} is broken in entry {number} ({error!s:.80}); "
                        "it was cut off or edited by hand: get it again"
                    ) from error
                chunk *= 2  # a long value is decoded again and again: log, not linear, times

    def _more(self, size: int) -> bool:
        found = self._stream.read(size)
        self.read += len(found)
        try:
            self._text = self._text[self._at :] + self._characters.decode(found, final=not found)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._stream.name} is no UTF-8 text ({error}); convert it first") from error
        self._at = 0
        return bool(found)
