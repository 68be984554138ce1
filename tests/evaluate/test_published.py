"""The sets in conf/benchmark that judge other things than retrieval: built from their YAML, and missing."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
from colours import Colours, paint
from omegaconf import OmegaConf

from conf.launch import evaluators, instantiate
from longclip.types import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "conf" / "benchmark"
PAGE = BENCHMARKS.parents[1] / "docs" / "evaluation-tasks.md"
KINDS = ("Classification", "Choices", "Twins", "Segmentation")
SETS = [
    path
    for path in sorted(BENCHMARKS.glob("*.yaml"))
    if any(f"evaluate.{k}\n" in path.read_text() for k in KINDS)
]


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_missing_set_shows_the_tree_that_is_expected(path, tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("LONGCLIP_BENCHMARKS", str(tmp_path))
    for evaluator in instantiate(OmegaConf.load(path)).values():
        tower = Colours() if "Segmentation" not in str(type(evaluator)) else _real(tiny)
        for root in (evaluator.root, tmp_path):  # no folder; a folder of something else
            with pytest.raises(UserError, match=r"put the set there[\s\S]*Expected in it:\n +\S"):
                type(evaluator)(**{**vars(evaluator), "root": str(root)})(tower, None)


def _real(tiny):
    from longclip.towers.clip import DualTower
    from longclip.towers.pretrained import build

    return DualTower(build(tiny, None, 248))


def test_your_own_questions_are_asked_as_the_yaml_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGCLIP_BENCHMARKS", str(tmp_path))
    paint(tmp_path / "choices", a="red")
    (tmp_path / "choices/questions.jsonl").write_text(
        '{"image": "a.png", "caption": "a red cup", "negatives": ["a blue cup", "a green cup"]}\n'
    )
    found = instantiate(OmegaConf.load(BENCHMARKS / "choices.yaml"))["choices"](Colours(), None)
    assert found.numbers["accuracy"] == 100


def commands():
    """The commands of this page of the docs, as words."""
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def test_every_command_of_the_docs_builds_its_benchmarks():
    judged = [words[3:] for words in commands() if words[:3] == ["python", "-m", "eval.run"]]
    assert len(judged) > 4
    for overrides in judged:
        overrides = [word.replace("model=", "source=") for word in overrides]
        with hydra.initialize_config_dir(str(BENCHMARKS.parent), version_base="1.3"):
            config = hydra.compose("eval", overrides=overrides)
        assert evaluators(config.benchmark)


def test_the_questions_in_the_docs_can_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGCLIP_BENCHMARKS", str(tmp_path))
    (line,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    paint(tmp_path / "choices", a="red")
    (tmp_path / "choices/a.png").rename(tmp_path / "choices/a.jpg")
    (tmp_path / "choices/questions.jsonl").write_text(line)
    found = instantiate(OmegaConf.load(BENCHMARKS / "choices.yaml"))["choices"](Colours(), None)
    assert found.numbers["questions"] == 1
