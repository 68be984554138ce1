"""Compare models: `python -m eval.compare runs/a runs/b ...`; the first is what the others are measured by.

Each argument is a model that `python -m eval.run` has judged, or the folder of its results. Out: a table of
differences with their intervals (see `deltas`); * marks those that leave out zero.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longclip.types import UserError

from .deltas import LEVEL, Results, compare
from .report.tables import number
from .results import find, load

_MINOR = re.compile(r"_(r5|r10|median|queries)$|/(tokens|tokens_max|truncated|overlap|chance)$")


def rows(names: Sequence[str], found: Sequence[Results], everything: bool, resamples: int) -> list[list[str]]:
    """Head and rows of the table: the yardstick's value, then value and difference of every other."""
    columns = [compare(found[0], results, resamples) for results in found[1:]]
    numbers = [name for name in columns[0] if all(name in column for column in columns)]
    if not numbers:
        raise UserError(
            f"{' and '.join(names)} have no benchmark in common: they were judged on "
            f"{' / '.join(', '.join(results) or 'nothing' for results in found)}"
        )
    head = ["", names[0], *(cell for name in names[1:] for cell in (name, "difference"))]
    body = [
        [name, number(columns[0][name].yardstick)]
        + [cell for column in columns for cell in (number(column[name].value), str(column[name]))]
        for name in numbers
        if everything or not _MINOR.search(name)
    ]
    return [head, *body]


def markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:], "", _note()]) + "\n"


def _note() -> str:
    return f"difference [{LEVEL:.0%} interval, paired bootstrap over images]; * leaves out zero"


def left_out(names: Sequence[str], found: Sequence[Results]) -> list[str]:
    """A sentence for each benchmark that not all models have."""
    benchmarks = dict.fromkeys(benchmark for results in found for benchmark in results)
    have = {b: [name for name, results in zip(names, found, strict=True) if b in results] for b in benchmarks}
    return [f"{b}: only for {', '.join(has)}" for b, has in have.items() if len(has) < len(names)]


def _show(table: Sequence[Sequence[str]]) -> None:
    shown = Table(*table[0], caption=_note(), title_justify="left")
    for row in table[1:]:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a judged model or a folder of results")
    parser.add_argument("--all", action="store_true", help="every number, not the main ones only")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap; default: 10000")
    parser.add_argument("--out", type=Path, help="write the table as Markdown here, too")
    options = parser.parse_args(arguments)
    try:
        if len(options.models) < 2:
            raise UserError("name two models or more to compare: python -m eval.compare runs/a runs/b")
        found = [load(find(model)) for model in options.models]
        table = rows(options.models, found, options.all, options.resamples)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(table)
    print(*(f"not compared: {line}" for line in left_out(options.models, found)), sep="\n", end="")
    if options.out:
        options.out.write_text(markdown(table), encoding="utf-8")
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
