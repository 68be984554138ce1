"""Values in an entry of a listing, by the paths that a layout names them by.

In: the fields of an entry. Out: what stands at `a.b`, `list[1]` or `turns[from=gpt].value`, and its texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .files import Unusable

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]|\[([^=\]]+)=([^\]]*)\]")


def find(fields: Mapping[str, Any], path: str) -> Any:
    """What stands at a path, None if nothing does. A filter makes a list."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for name, place, key, wanted in _STEP.findall(path):
        if key:
            items = value if isinstance(value, list) else []
            value = [item for item in items if isinstance(item, dict) and str(item.get(key)) == wanted]
        elif place:
            value = value[int(place)] if isinstance(value, list) and int(place) < len(value) else None
        elif isinstance(value, list):
            value = [item[name] for item in value if isinstance(item, dict) and name in item]
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def first(fields: Mapping[str, Any], paths: Iterable[str]) -> Any:
    """What stands at the first of these paths that has something."""
    return next((value for path in paths if (value := find(fields, path)) is not None), None)


def texts_in(value: object) -> list[str]:
    """One text or a list of texts; nothing for None.

    Raises:
        Unusable: anything else, or letters where a list of texts is meant.
    """
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Unusable("captions are no text", f"{value!r:.80}")
    if len(texts) > 2 and all(len(text) <= 1 for text in texts):
        raise Unusable("captions are single letters", f"{''.join(texts)!r:.80}: a string taken for a list")
    return texts


def plain(value: object) -> object:
    """A value as JSON knows it: dates and the like become text, NaN null, broken characters "?"."""
    text = json.dumps(value, default=str, ensure_ascii=False).encode(errors="replace").decode()
    return json.loads(text, parse_constant=lambda name: None)
