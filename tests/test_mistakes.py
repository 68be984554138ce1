"""docs/mistakes.md: each of its commands, typed in a small project, answers what the page says.

A page block is `$ COMMAND` and the answer; `...` stands for what is left out, line breaks for any space.
"""

import errno
import json
import re
import shutil
from pathlib import Path

import open_clip
import project
import pytest
from commands import ROOT, Command, type_in
from tiny import TINY

PAGE = ROOT / "docs" / "mistakes.md"
SECTION = re.compile(r"^### (.+?)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
FOUND = dict(SECTION.findall(PAGE.read_text("utf-8")))


def block(section):
    """The command and the answer of a section."""
    found = re.search(r"^```console\n\$ (.+?)\n(.+?)^```", section, re.MULTILINE | re.DOTALL)
    assert found, section
    return found[1], found[2]


def pattern(answer):
    """A page's answer as an expression over what is printed, whatever is shortened and wherever it wraps."""
    words = r"\s+".join(map(re.escape, answer.split()))
    return re.compile(re.sub(r"(\\s\+)?(\\\.){3}(\\s\+)?", ".*?", words), re.DOTALL)


def spoil(line, **changes):
    """One line of captions.jsonl, or all of them (None), with other fields; None takes a field away."""
    path = Path("my_photos/captions.jsonl")
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        if line in (None, number):
            row |= changes
    project.listing(path.parent, [{k: v for k, v in row.items() if v is not None} for row in rows])


def cut_image(_):
    path = Path("my_photos/4.jpg")
    path.write_bytes(path.read_bytes()[:-200])


def cut_shard(_):
    shutil.copytree("datasets/mine", "datasets/copied")
    tar = Path("datasets/copied/train/000000.tar")
    tar.write_bytes(tar.read_bytes()[:-1024])


def without_s3fs(patch):
    def refuse(url):
        raise ImportError("Install s3fs to access S3")

    patch.setattr("fsspec.core.url_to_fs", refuse)


def full_disk(patch):
    from longclip import checkpoints

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(checkpoints, "write_share", refuse)


def judged_in_two_ways(_):
    judge = "python -m eval.run model=runs/mine report=false " + " ".join(project.OWN[:-1])
    project.typed(f"{judge} out=results/a")
    project.typed(f"{judge} out=results/b benchmark.dev.views.captions.count=1")


PREPARE = {
    "The captions have another name": lambda _: spoil(None, captions=None, text="A dog."),
    "A caption is empty": lambda _: spoil(5, captions=[" "]),
    "An image is damaged": cut_image,
    "A shard was not copied whole": cut_shard,
    "S3 without its library": without_s3fs,
    "The disk is full": full_disk,
    "Numbers that do not compare": judged_in_two_ways,
}
RESNET = {
    **TINY,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
}
MORE = {
    "A context length that the stretch does not give": [
        f"model.backbone.architecture={project.ARCHITECTURE}",
        "model.backbone.weights=models/b16.pt",
    ],
    "Patches from a tower without them": ["model.backbone.architecture=RN-longclip-tiny"],
    "More components than images": ["samples=16"],
}
"""What stands for large models, and what else a section needs."""
WITHOUT = {
    "An unknown model": "model",
    "Weights that this model does not have": "model",
    "A context length that the stretch does not give": "model",
    "Another activation than the weights had": "model",
    "Patches from a tower without them": "model",
    "A warm-up longer than the run": "optim",
    "A GPU that is not there": "trainer",
}
"""Where SMALL's choices would hide the mistake: the keys that are left as they are."""
SLOW = (
    "A batch of one",
    "More components than images",
    "A GPU that is not there",
    "A sweep of many processes",
    "The disk is full",
    "Numbers that do not compare",
    "Judged on what was trained on",
    "Captions longer than the context",
    "wandb without a login",
    "Boxes among dropped patches",
)
"""Those that come to a first step, judge, or import a large library."""


def more(title, command):
    """What makes its training small, as far as the page does not say it itself."""
    said = {word.partition("=")[0] for word in command.arguments}
    left = WITHOUT.get(title, "nothing")
    small = [word for word in project.small(command) if word.partition("=")[0] not in said]
    return [word for word in small if not word.startswith(left)] + MORE.get(title, [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("project")
    (folder / "RN-longclip-tiny.json").write_text(json.dumps(RESNET))
    open_clip.add_model_config(folder / "RN-longclip-tiny.json")
    return project.make(folder)


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(project.beside(whole, tmp_path))


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[pytest.mark.long] if title in SLOW else []) for title in FOUND]
)
def test_a_mistake_is_answered_as_the_page_says(title, here, monkeypatch):
    text, answer = block(FOUND[title])
    PREPARE.get(title, lambda _: None)(monkeypatch)
    command = Command("docs/mistakes.md", text, "")
    found = type_in(command, *more(title, command))
    assert "Traceback" not in found.printed, found.printed
    assert pattern(answer).search(re.sub("[│\\s]+", " ", found.printed)), found.printed
    assert found.code == (2 if "error:" in answer else 0), found.printed


def test_the_page_has_the_commonest_mistakes():
    assert len(FOUND) >= 25
    assert {*PREPARE, *MORE, *WITHOUT, *SLOW} <= set(FOUND), "a case of a section that is gone"


def test_what_the_page_leaves_out_does_not_empty_it():
    for title, section in FOUND.items():
        shown = [word for word in block(section)[1].split() if word != "..."]
        assert len(shown) >= 6, title
