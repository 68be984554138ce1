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

    from .. import recipes

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if options.name:
        _explain(console, recipes.read(recipes.find(options.name)))
    else:
        _list(console)


def _list(console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .. import recipes

    table = Table("recipe", "what it is", "needs", box=box.SIMPLE)
    for name in recipes.names():
        try:
            recipe = recipes.read(recipes.find(name))
            table.add_row(name, Text(recipe.title), Text(recipe.needs))
        except UserError as error:  # somebody's own, in the making
            table.add_row(name, Text(str(error)))
    console.print(table)
    console.print("longclip recipes NAME explains one; python train.py recipe=NAME trains with it")


def _explain(console: Any, recipe: Any) -> None:
    paragraphs = [
        recipe.title,
        f"Needs: {recipe.needs}",
        f"Costs: {recipe.costs}",
        f"Goes wrong: {recipe.wrong}",
        "\n".join(["Captions:", *(f"  {name}: {call}" for name, call in recipe.captions.items())]),
        "\n".join(["Terms:", *(f"  {name}: {call}" for name, call in recipe.terms.items())]),
        f"python train.py recipe={recipe.name} name=mine",
    ]
    console.print("\n\n".join(paragraphs), markup=False)
