"""What our HTML pages share: how colours, type, cards and tables look; each adds its own rules behind.

In: a page's template, and what stands for its names. Out: the page, complete in itself.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

_STYLE = Path(__file__).with_name("style.html")


def filled(template: Path, **values: str) -> str:
    """The page; `$style` in its template is what all pages share."""
    return Template(_read(template)).substitute(values, style=_read(_STYLE).strip())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
