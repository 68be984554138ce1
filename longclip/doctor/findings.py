"""What a check says: one line with a level, what it looked at, what it saw, what it expected, what to type.

A check is a function that yields findings. One that fails is a finding, too: the doctor never crashes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from ..types import UserError

Level = Literal["ok", "warning", "problem"]
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


class Finding(NamedTuple):
    """One line. `expected` and `remedy` are empty where all is well."""

    level: Level
    about: str  # what was looked at, a few words
    seen: str
    expected: str = ""
    remedy: str = ""  # what to type

    def __str__(self) -> str:
        line = f"{self.level:<8} {self.about:<14} {self.seen}"
        line += f"; expected {self.expected}" if self.expected else ""
        line += f". Type: {self.remedy}" if self.remedy else ""
        # A key or a path may hold anything, also what moves a terminal's cursor.
        return "".join(char if char.isprintable() else "?" for char in line)


Check = Callable[[], Iterable[Finding]]


def run(about: str, check: Check) -> list[Finding]:
    """The findings of a check, whatever happens in it."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except UserError as error:
        found.append(Finding("problem", about, str(error)))
    except Exception as error:
        why = f"this check could not be made ({type(error).__name__}: {error})"
        found.append(Finding("problem", about, why, "", "python -X dev -m longclip.cli doctor"))
    return found


def show(findings: Iterable[Finding]) -> bool:
    """Print findings as they come, in colour on a terminal; whether one of them is a problem."""
    bad = False
    for finding in findings:
        bad |= finding.level == "problem"
        if sys.stdout.isatty():
            _coloured(finding)
        else:
            print(finding, flush=True)
    return bad


def _coloured(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text(str(finding), overflow="fold")
    line.stylize(_COLOURS[finding.level], 0, len(finding.level))
    if finding.remedy:
        line.stylize("bold", len(line) - len(finding.remedy))
    Console(width=max(60, shutil.get_terminal_size().columns)).print(line)
