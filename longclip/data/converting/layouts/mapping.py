"""A layout: which field of a data set means what. One commented YAML each; a new layout is a new YAML.

In: the YAML and the fields of one entry. Out: its image's name, key, split, captions and meta. The keys:

    about:     one line: what the set is
    files:     what holds the entries, patterns in the order of preference: listings (`*.jsonl`,
               `annotations/*.json`, `*.csv`, `*.parquet`), `*.tar` for webdatasets, `**` for loose
               files that share a name. Not needed for a source that is a file itself
    image:     the field with the image's path, or a list: the first that an entry has. Not needed for
               `*.tar` and `**`, where the image has the name of its entry
    suffix:    added to image paths that have none of an image, such as .jpg
    folders:   where image paths begin, tried in turn, relative to the listing or to --images
    key:       the field with a name that is unique; default: made from the image's path
    captions:  {source: field}, or {source: {field: or join:, ...}}, or one field that holds a list of
               captions or {source: captions}. Of each source:
                 field         one field, or a list: the first that an entry has
                 join          a list of fields that make one caption together, line by line
                 strip_prefix  what every caption begins with and should not
                 sentences     true: the items of a list are sentences of one caption, not captions
                 optional      true: not every entry has it
    split:     {field: f}, {held_out: N} for the first N entries, or {file: f} for a JSON {split: [names]};
               with `default` (train) and `name` (test: of those held out)
    meta:      fields to keep beside the captions, or "*" for all that are not used otherwise

A field is named as it is, or by a path: `a.b`, `list[1]`, and `turns[from=gpt].value` for every item of a
list that has this value.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ....types import UserError
from .fields import find, first, plain, texts_in
from .files import Unusable

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class CaptionRule:
    """Where the captions of one source are."""

    source: str
    field: Sequence[str] = ()
    join: Sequence[str] = ()
    strip_prefix: Sequence[str] = ()
    sentences: bool = False
    optional: bool = False

    def texts(self, fields: Mapping[str, Any]) -> list[str]:
        """The captions that an entry has of this source.

        Raises:
            Unusable: what is there is no text.
        """
        if self.join:
            values = [value for path in self.join if (value := find(fields, path)) is not None]
            texts = ["\n".join(text for value in values for text in texts_in(value))] if values else []
        else:
            texts = texts_in(first(fields, self.field))
            texts = ["\n".join(texts)] if self.sentences and texts else texts
        return [self._stripped(text) for text in texts]

    def _stripped(self, text: str) -> str:
        for prefix in self.strip_prefix:
            text = text.lstrip().removeprefix(prefix).lstrip()
        return text


@dataclass(frozen=True)
class SplitRule:
    """Which split an entry is in."""

    field: str = ""
    file: str = ""
    held_out: int = 0
    name: str = "test"
    default: str = "train"


@dataclass(frozen=True)
class Layout:
    """A mapping YAML, checked; see the head of this module."""

    about: str
    files: Sequence[str] = ()
    image: Sequence[str] = ()
    suffix: str = ""
    folders: Sequence[str] = ("",)
    key: Sequence[str] = ()
    captions: Sequence[CaptionRule] = ()
    listed: str = ""  # one field that holds all captions, instead of `captions`
    split: SplitRule = field(default_factory=SplitRule)
    meta: Sequence[str] = ()

    def digest(self) -> str:
        """Tells one mapping from another."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def captions_of(self, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(source, text) pairs; the text is empty where an entry lacks a source that is not optional.

        Raises:
            Unusable: what is there is no text.
        """
        if self.listed:
            value = find(fields, self.listed)
            if value is None:
                raise Unusable("no captions", f"no field {self.listed!r}, the entry has {', '.join(fields)}")
            return _listed(value)
        found = []
        for rule in self.captions:
            texts = rule.texts(fields) or ([] if rule.optional else [""])
            found += [(rule.source, text) for text in texts]
        return found

    def meta_of(self, fields: Mapping[str, Any]) -> dict[str, object]:
        """What is kept beside the captions, as plain JSON values."""
        if "*" not in self.meta:
            return {name: plain(fields[name]) for name in self.meta if fields.get(name) is not None}
        rules = [path for rule in self.captions for path in (*rule.field, *rule.join)]
        used = {*self.image, *self.key, self.listed, self.split.field, *rules}
        return {str(name): plain(value) for name, value in fields.items() if name not in used}


def shipped() -> dict[str, Path]:
    """The layouts that come with longclip, by name."""
    folder = Path(str(resources.files(__package__)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str, held_out: int | None = None) -> Layout:
    """A shipped layout by name, or a user's own by the path of its YAML.

    `held_out` replaces the layout's own number of entries at the start that are not trained on.

    Raises:
        UserError: there is none, or its YAML says something that a layout does not know.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped().get(name)
    if path is None or not path.is_file():
        raise UserError(
            f"there is no layout {name!r}; choose one of {', '.join(shipped())}, or give the path of your "
            "own YAML (copy the nearest one: " + str(shipped()["jsonl"]) + ")"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no layout: {' '.join(str(error).split())}; see {_HELP}") from error
    layout = parse(values, str(path))
    if held_out is None:
        return layout
    return replace(layout, split=replace(layout.split, held_out=held_out))


def parse(values: object, where: str) -> Layout:
    """A layout from the content of its YAML, which may be wrong; `where` names it in errors."""
    try:
        return _layout(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is no layout: {' '.join(str(error).split())}; see {_HELP}") from error


_HELP = "the head of longclip/data/converting/layouts/mapping.py"


def _layout(values: Any) -> Layout:
    if not isinstance(values, dict) or "captions" not in values:
        raise ValueError("it has no `captions`")
    values = dict(values)
    captions = values.pop("captions")
    if isinstance(captions, str):
        values["listed"] = captions
    else:
        values["captions"] = tuple(_rule(source, rule) for source, rule in captions.items())
    values["split"] = SplitRule(**values.get("split") or {})
    for name in ("files", "image", "folders", "key", "meta"):
        if name in values:
            values[name] = _names(values[name])
    return Layout(**values)


def _rule(source: object, rule: object) -> CaptionRule:
    if not isinstance(source, str) or not PLAIN.fullmatch(source):
        raise ValueError(f"the caption source {source!r} is no plain name")
    options: dict[str, Any] = dict(rule) if isinstance(rule, dict) else {"field": rule}
    for name in ("field", "join", "strip_prefix"):
        if name in options:
            options[name] = _names(options[name])
    if bool(options.get("field")) == bool(options.get("join")):
        raise ValueError(f"the caption source {source} needs either `field` or `join`")
    return CaptionRule(source, **options)


def _names(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is no name and no list of names")
    return tuple(names)


def _listed(value: object) -> list[tuple[str, str]]:
    """A plain string is refused: where a list is meant it would become letters."""
    if isinstance(value, dict):
        odd = [source for source in value if not (source.isprintable() and 0 < len(source) <= 64)]
        if odd:
            raise Unusable("caption source is no plain name", f"{odd[0]!r:.80}")
        return [(source, text) for source, texts in value.items() for text in texts_in(texts)]
    if not isinstance(value, list):
        raise Unusable("captions are no list of texts", f"{value!r:.80}")
    return [("caption", text) for text in texts_in(value)]
