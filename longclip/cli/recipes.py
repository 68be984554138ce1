"""The command about recipes: `recipes` lists them, `recipes NAME` explains one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..types import UserError


def recipes_command(commands: Any) -> None:
    known = commands.add_parser("recipes", help="the methods that there are, or what one is, needs and costs")
    known.add_argument("name", nargs="?", help="explain this one; default: list all")
    known.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> None:
    from rich.console import Console

    # A row of the list to a line, for whoever pipes it.
    console = Console(width=None if sys.stdout.isatty() else 100 if options.name else 200, highlight=False)
    _explain(console, options.name) if options.name else _list(console)


def _list(console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from .. import recipes

    table = Table("recipe", "method", "needs, above all", box=None, padding=(0, 2, 0, 0))
    for name in recipes.names():
        try:
            recipe = recipes.read(recipes.find(name))
            table.add_row(name, Text(recipe.method), Text(recipe.data))
        except UserError as error:  # somebody's own, in the making
            table.add_row(name, "", Text(str(error)))
    console.print(table)
    console.print("\nlongclip recipes NAME explains one; python train.py recipe=NAME trains with it")


def _explain(console: Any, name: str) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from .. import recipes

    path = recipes.find(name)
    recipe = recipes.read(path)
    console.print(Text(recipe.title))
    for label, text in zip(recipes.PARAGRAPHS, (recipe.needs, recipe.costs, recipe.wrong), strict=True):
        console.print(Text.assemble((f"\n{label}: ", "bold"), text))
    for label, rows in (
        ("Captions", recipe.captions),
        ("Terms", recipe.terms),
        ("Sets", recipe.settings),
    ):
        if rows:
            table = Table.grid(padding=(0, 2, 0, 0))
            for key, value in rows.items():
                table.add_row(Text(key), Text(value))
            console.print(Text(f"\n{label}:", "bold"), Padding(table, (0, 0, 0, 2)))
    asked = {
        "model.backbone.weights": " model=vit_b16",
        "data.sidecar.stores": " data.sidecar.stores=[STORE]",
    }
    given = "".join(override for need, override in asked.items() if need in recipe.needs)
    console.print(
        f"\n{path} says what its values mean\npython train.py recipe={name}{given} name=mine", markup=False
    )
