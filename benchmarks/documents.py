"""Figures in a document are made, not typed: what stands between two marks is written by a benchmark.

<!-- NAME: made by COMMAND -->
...
<!-- /NAME -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from .measures import Row, cells


def replace(document: Path, name: str, text: str) -> None:
    """Put `text` between the marks of that name."""
    before, _, after = _parts(document, name)
    document.write_text(f"{before}\n{text.strip()}\n{after}")


def read(document: Path, name: str) -> str:
    """What stands between the marks of that name."""
    return _parts(document, name)[1].strip()


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, align, *lines])


def figures(path: Path, told: object) -> None:
    """Write them all as JSON, in the digits that a reader can use."""
    short = json.loads(json.dumps(told), parse_float=lambda digits: round(float(digits), 3))
    path.write_text(json.dumps(short, indent=0) + "\n")


def of_rows(rows: Sequence[Row]) -> str:
    """A Markdown table of measured figures."""
    head = ["", "measure", "ours", "open_clip's", "ratio", "goal", "limit", "met"]
    met = {None: "", True: "yes", False: "**no**"}
    return table(head, [[*cells(row), met[row.met]] for row in rows])


def _parts(document: Path, name: str) -> tuple[str, str, str]:
    found = re.fullmatch(
        rf"(.*<!-- {re.escape(name)}\b[^\n]*-->)(.*)(<!-- /{re.escape(name)} -->.*)",
        document.read_text(),
        re.DOTALL,
    )
    if found is None:
        raise SystemExit(f"{document} has no marks <!-- {name} --> ... <!-- /{name} --> to write between")
    return found[1], found[2], found[3]
