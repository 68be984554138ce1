"""Commands as the pages write them: found in Markdown, taken apart, and typed in this process.

In: ```bash blocks. Out: `Command`s; `type_in` gives exit code and all that was printed. Every program is a
function here, so a page of them costs no process and no import twice.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
HYDRA = {"train.py": "train", "eval.run": "eval"}
"""Programs that Hydra starts, and their configs."""


class Command(NamedTuple):
    """One line of a shell, as a page has it."""

    page: str
    text: str  # continued lines joined, the remark left out
    remark: str  # what stands behind the # at the end

    @property
    def words(self) -> list[str]:
        """What the shell would make of it, variables and torchrun left out; a pattern becomes its files."""
        words = [word for word in shlex.split(self.text) if word != "..."]
        words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
        begins = next(i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=\S*", word))
        if words[begins] == "torchrun":
            begins = words.index("train.py" if "train.py" in words else "-m") - 1
            words[begins] = "python"
        return words[begins:]

    @property
    def program(self) -> str:
        """`longclip`, `train.py`, `eval.run`, ... or what else begins the line."""
        words = self.words
        if words[0] == "python":
            return words[2] if words[1] == "-m" else words[1]
        return words[0]

    @property
    def arguments(self) -> list[str]:
        """What follows the program, up to a redirection."""
        words = self.words
        words = words[words.index(self.program) + 1 :]
        return words[: next((i for i, word in enumerate(words) if word in ("<", "&")), len(words))]


class Answer(NamedTuple):
    code: int
    printed: str  # standard output and error, together


def of_page(path: Path, kind: str = "bash") -> Iterator[Command]:
    """Every command in the blocks of a page."""
    for block in re.findall(rf"^```{kind}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text, _, remark = re.match(r"(.*?)(\s+#\s+(.*))?$", line.strip()).groups()  # type: ignore[union-attr]
            if text and not text.startswith("#"):
                yield Command(str(path.relative_to(ROOT)), " ".join(text.split()), remark or "")


def type_in(command: Command, *more: str) -> Answer:
    """Run it in this process, from where this process is, with `more` behind its own arguments."""
    said, read, words = io.StringIO(), _read(command), command.arguments
    words = [*(w for w in words if w != "-m"), *more, *(w for w in words if w == "-m")]
    with (
        mock.patch.object(sys, "argv", [command.program, *words]),
        mock.patch.object(sys, "stdin", read),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        untouched(),
    ):
        try:
            code = _call(command.program, words)
        except SystemExit as left:
            code, text = (left.code, "") if isinstance(left.code, int) else (1, str(left.code or ""))
            said.write(text)
        except Exception:
            code = 1
            said.write(traceback.format_exc())
    return Answer(code or 0, said.getvalue())


def check(command: Command) -> None:
    """Let the program read its arguments and do nothing; AssertionError where it does not understand them."""
    if command.program in HYDRA:
        return _compose(command)
    read = argparse.ArgumentParser.parse_args

    def only_read(self: argparse.ArgumentParser, *given: Sequence[str] | None) -> None:
        read(self, *given)
        raise _ReadError

    with mock.patch.object(argparse.ArgumentParser, "parse_args", only_read):
        answer = type_in(command)
    assert "_ReadError" in answer.printed or "--help" in command.arguments, f"{command}: {answer.printed}"
    return None


class _ReadError(Exception):
    """The arguments have been read."""


def _compose(command: Command) -> None:
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    words = [
        re.sub(r"^model=", "source=", w) if command.program == "eval.run" else w for w in command.arguments
    ]
    overrides = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    plain = [
        f"{each.get_key_element()}={next(iter(each.sweep_string_iterator()))}"
        if each.is_sweep_override()
        else each.input_line
        for each in overrides
        if not each.key_or_group.startswith("hydra")
    ]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose(HYDRA[command.program], overrides=plain)
    OmegaConf.to_container(config, resolve=True)


def _call(program: str, arguments: list[str]) -> int | None:
    if program == "longclip":
        return importlib.import_module("longclip.cli").main(arguments)
    if program == "train.py":
        from conf.launch import launch

        return launch(importlib.import_module("train").main, "train")
    if program in ("benchmarks", "longclip.preflight"):
        program += ".__main__"
    return importlib.import_module(program).main()


def _read(command: Command) -> io.StringIO:
    """What a file that stands behind < would be read as."""
    words = command.words
    file = Path(words[words.index("<") + 1]) if "<" in words else None
    return io.StringIO(file.read_text() if file and file.exists() else "")


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """What programs change of their process is put back: logging, signals, the environment."""
    handlers, level = logging.root.handlers[:], logging.root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    environment = dict(os.environ)
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
