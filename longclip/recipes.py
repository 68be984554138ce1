"""The recipes at hand, as their files describe themselves: what each is, needs, costs, and what goes wrong.

In: conf/recipe/*.yaml of the clone one stands in, or of the one that this package lies in. Out: `Recipe`s.
Each file opens with a header of four paragraphs, which is data (`read`):

    # TITLE (Authors et al. YEAR, arXiv NNNN.NNNNN): what it is.
    # Needs: what the data and the towers must have.
    # Costs: what it adds to recipe=long.
    # Goes wrong: what is known to.

Nothing that a recipe names is built, so that listing them takes no torch and no time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .types import UserError

PARAGRAPHS = ("Needs", "Costs", "Goes wrong")


class Recipe(NamedTuple):
    """A recipe as its file describes it."""

    name: str
    title: str  # which method, by whom, and what it is
    needs: str
    costs: str
    wrong: str
    captions: dict[str, str]  # group -> policy with its values, as one would call it
    terms: dict[str, str]
    settings: dict[str, str]  # what else it sets, by its key

    @property
    def method(self) -> str:
        """Whose it is, in a few words: "LiT (Zhai et al. 2021)"."""
        name, _, rest = re.split(r":(?![^(]*\))", self.title)[0].partition(" (")
        return f"{name} ({re.split(r',? arXiv|;', rest.rstrip(')'))[0]})" if rest else name

    @property
    def data(self) -> str:
        """What it needs above all: "captions of several sentences"."""
        return re.split(r"[;:.]? \(|[;:.] |[;.]$", self.needs)[0]


def folders() -> list[Path]:
    """Where recipes lie: below the current directory first, then beside this package."""
    roots = (Path.cwd(), Path(__file__).resolve().parents[1])
    return [folder for root in dict.fromkeys(roots) if (folder := root / "conf" / "recipe").is_dir()]


def find(name: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: there is none of this name.
    """
    if name not in names():
        known = ", ".join(names()) or "there is no conf/recipe here: stand in a clone of longclip"
        raise UserError(f"there is no recipe {name!r}; choose one of {known}")
    return next(path for folder in folders() if (path := folder / f"{name}.yaml").is_file())


def names() -> list[str]:
    """Of all recipes at hand."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


def read(path: Path) -> Recipe:
    """A recipe from its file.

    Raises:
        UserError: its header lacks a paragraph.
    """
    config = _composed(path)
    own = config.pop("recipe", None) or {}
    captions, terms = (
        {name: _call(node) for name, node in (own.get(part) or {}).items()} for part in ("captions", "terms")
    )
    title, needs, costs, wrong = _header(path)
    return Recipe(path.stem, title, needs, costs, wrong, captions, terms, dict(_settings(config)))


def _header(path: Path) -> list[str]:
    """The title and the paragraphs, each on one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines[: _first_key(lines)] if not line.startswith("# @package")]
    text = "\n".join(line.lstrip("#").strip() for line in comments)
    cuts = "".join(rf"\n{paragraph}: (.+?)" for paragraph in PARAGRAPHS)
    found = re.fullmatch(rf"\s*(.+?){cuts}\s*", text, re.DOTALL)
    if found is None:
        wanted = ", ".join(f'"# {paragraph}: ..."' for paragraph in PARAGRAPHS)
        raise UserError(f"{path} opens with no header of a recipe: a title, then {wanted}, in this order")
    return [" ".join(paragraph.split()) for paragraph in found.groups()]


def _first_key(lines: list[str]) -> int:
    return next((n for n, line in enumerate(lines) if line and not line.startswith("#")), len(lines))


def _composed(path: Path) -> dict[str, Any]:
    """What it sets, over what the recipes set that it is made on top of."""
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    composed: dict[str, Any] = {}
    for base in _bases(config.pop("defaults", None) or (), path):
        composed = _over(composed, _composed(base))
    return _over(composed, config)


def _bases(defaults: Iterable[Any], path: Path) -> Iterator[Path]:
    for entry in defaults:
        if isinstance(entry, str) and entry != "_self_":
            yield path.with_name(f"{entry}.yaml")


def _over(base: Any, node: Any) -> Any:
    """A node over the one of its name in a base, as Hydra merges them."""
    if not (isinstance(base, dict) and isinstance(node, dict)):
        return node
    return base | {key: _over(base.get(key), value) for key, value in node.items()}


def _settings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Its values with the keys that one would type."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _settings(value, f"{key}.{name}".lstrip("."))
    else:
        yield key, _call(node)


def _call(node: Any) -> str:
    """A node as the call that it describes.

    >>> _call({"_target_": "longclip.captions.Sentences", "count": 2})
    'Sentences(count=2)'
    """
    if isinstance(node, dict):
        values = ", ".join(f"{key}={_call(value)}" for key, value in node.items() if key != "_target_")
        target = str(node.get("_target_", "")).rpartition(".")[2]
        return f"{target}({values})" if target else f"{{{values}}}"
    if isinstance(node, list):
        return f"[{', '.join(map(_call, node))}]"
    return "null" if node is None else str(node).lower() if isinstance(node, bool) else str(node)
