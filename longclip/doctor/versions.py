"""Is what is installed what longclip was made for? Read from package metadata; imports only what it must."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .findings import Finding

_INSTALL = "pip install -c constraints.txt -e ."
_TOGETHER = "pip install --force-reinstall -c constraints.txt torch torchvision"


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted, seen = metadata.metadata("longclip")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(seen, prereleases=True):
        yield Finding("ok", "python", seen)
    else:
        yield Finding("problem", "python", seen, wanted, "python3.12 -m venv .venv, and install again")


def packages() -> Iterator[Finding]:
    """Everything that longclip requires, against its ranges; what fits shares one line."""
    from packaging.requirements import Requirement

    fitting = []
    for requirement in map(Requirement, metadata.requires("longclip") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        try:
            seen = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("problem", name, "not installed", wanted, _INSTALL)
            continue
        if requirement.specifier.contains(seen, prereleases=True):
            fitting.append(f"{name} {seen}")
        else:
            yield Finding("problem", name, seen, wanted, _INSTALL)
    yield Finding("ok", "packages", ", ".join(fitting))


def torchvision() -> Iterator[Finding]:
    """torch and torchvision are built in pairs: a CPU build of one beside a CUDA build of the other dies."""
    builds = {name: build(name) for name in ("torch", "torchvision")}
    absent = [name for name, found in builds.items() if found is None]
    if absent:
        yield Finding("problem", "torchvision", f"{' and '.join(absent)} not found", "both", _TOGETHER)
        return
    seen = " beside ".join(f"{name} {found}" for name, found in builds.items())
    kinds = {str(found).partition("+")[2] for found in builds.values()}
    if len(kinds) > 1:
        yield Finding("problem", "torchvision", seen, "two builds of one kind", _TOGETHER)
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        yield Finding("problem", "torchvision", f"{seen}: {_reason(error)}", "a matching pair", _TOGETHER)
        return
    yield Finding("ok", "torchvision", seen)


def build(name: str) -> str | None:
    """A package's version with its kind of build ("2.15.0+cpu"), read from its file, not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return metadata.version(name)
    found = re.search(r"""__version__ = ['"]([^'"]+)['"]""", text)
    return found[1] if found else metadata.version(name)


def _reason(error: Exception) -> str:
    if "torchvision::nms" in str(error):
        return "torchvision was built for another torch (operator torchvision::nms does not exist)"
    return f"import fails ({type(error).__name__}: {str(error)[:200]})"
