"""The direction of the arrows: a file imports only from rooms above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "longclip"

ROOMS = """types curriculum hardware launching preflight dist tokens sentences captions data towers objectives
    metrics heat ema optim strategies stored runs models embedding facets averaging evaluate gallery failing
    checkpoints loggers stopping watchdog memory observing training planner callbacks banner export recipes
    pages preview doctor search cli""".split()  # noqa: SIM905

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """(package or None, name) of everything a file imports, relative imports resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            start = base[: len(base) - node.level] if node.level else []
            module = start + (node.module.split(".") if node.module else [])
            yield from ([*module, alias.name] for alias in node.names)


def room(parts):
    return parts[1] if len(parts) > 1 and parts[0] == "longclip" and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for parts in imported(path):
        assert parts[0] not in ("hydra", "omegaconf", "eval", "conf"), f"{path.name} imports {parts[0]}"
        other = room(parts)
        if other and own in ROOMS:
            assert ROOMS.index(other) <= ROOMS.index(own), f"{own} imports {other}, which lies below it"
            assert {own, other} != {"data", "towers"}, "data and towers meet in types, nowhere else"


def test_every_room_is_listed():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("heavy", ["wandb", "deepspeed", "webdataset", "syntok", "simplejpeg", "hydra"])
def test_each_heavy_dependency_has_few_homes(heavy):
    homes = [p.name for p in FILES if any(parts[0] == heavy for parts in imported(p))]
    assert len(homes) <= 2, homes
