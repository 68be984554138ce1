"""What recipes tell about themselves: every file has its header, and the command shows it without torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from longclip import recipes
from longclip.cli import main
from longclip.types import UserError

FOLDER = Path(__file__).resolve().parents[1] / "conf" / "recipe"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_its_paper_what_it_needs_costs_and_what_goes_wrong(path):
    recipe = recipes.read(path)
    assert re.search(r"arXiv \d{4}\.\d{4,5}\b|\(ours\)", recipe.title), f"whose is it: {recipe.title}"
    assert all(len(text) > 10 for text in recipe[1:5])
    assert recipe.captions, f"{path.name} has no caption groups"
    assert recipe.terms, f"{path.name} has no terms"
    assert 3 < len(recipe.method) < 90, "a row of the list names it"
    assert 10 < len(recipe.data) < 140, "and says what to have"
    deep = re.findall(r"longclip\.(?:captions|objectives)\.\w+\.\w+", path.read_text())
    assert not deep, "parts are named as their package exports them"


def test_a_header_may_wrap_and_keeps_its_paragraphs_apart(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# @package _global_\n# A title\n# of two lines.\n# Needs: captions: several.\n# Costs: none\n"
        "# at all.\n# Goes wrong: (1) a\n#   b\n\nrecipe:\n  captions: # more\n    a: {_target_: x.Whole}\n"
    )
    recipe = recipes.read(path)
    assert recipe[:5] == ("mine", "A title of two lines.", "captions: several.", "none at all.", "(1) a b")
    assert recipe.captions == {"a": "Whole()"}


def test_the_list_says_in_short_whose_it_is_and_what_it_needs():
    told = recipes.Recipe(
        "a", "A: one (B et al. 2020, arXiv 2001.00001; C), D: b", "c.d: e", "", "", {}, {}, {}
    )
    assert told.method == "A"
    assert (
        told._replace(title="A (B et al. 2020, arXiv 2001.00001; C: D) on E: b").method == "A (B et al. 2020)"
    )
    assert told._replace(title="Ours (ours): a (b): c").method == "Ours (ours)"
    assert told.data == "c.d"
    assert told._replace(needs="a, b (c; d). e").data == "a, b"
    assert told._replace(needs="a file.b; c.").data == "a file.b"


def test_what_a_recipe_sets_beside_itself_is_told_as_one_would_type_it(tmp_path):
    head = "# T\n# Needs: a\n# Costs: b\n# Goes wrong: c\n"
    (tmp_path / "mine.yaml").write_text(head + "model:\n  lora: {rank: 8, alpha: null}\nrecipe: {}\n")
    assert recipes.read(tmp_path / "mine.yaml").settings == {
        "model.lora.rank": "8",
        "model.lora.alpha": "null",
    }


@pytest.mark.parametrize("lacking", recipes.PARAGRAPHS)
def test_a_header_without_a_paragraph_is_a_sentence(tmp_path, lacking):
    kept = [f"# {name}: something." for name in recipes.PARAGRAPHS if name != lacking]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(["# @package _global_", "# A title.", *kept, "recipe: {}"]))
    with pytest.raises(UserError, match=r"mine\.yaml opens with no header"):
        recipes.read(path)


def test_a_recipe_on_top_of_another_shows_what_both_say(tmp_path):
    head = "# @package _global_\n# T\n# Needs: a\n# Costs: b\n# Goes wrong: c\n"
    (tmp_path / "base.yaml").write_text(
        head
        + "recipe:\n  captions: {long: {_target_: x.Whole}}\n  terms: {long: {_target_: y.Loss, a: long}}\n"
    )
    (tmp_path / "more.yaml").write_text(
        head + "defaults: [base, _self_]\nrecipe:\n  terms: {long: {margin: 0.5}, other: {_target_: y.Two}}\n"
    )
    recipe = recipes.read(tmp_path / "more.yaml")
    assert recipe.captions == {"long": "Whole()"}
    assert recipe.terms == {"long": "Loss(a=long, margin=0.5)", "other": "Two()"}


def test_the_command_lists_all_and_explains_one(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^ *{path.stem}\b", listed, re.MULTILINE) for path in FILES)
    assert main(["recipes", "dreamlip"]) == 0
    told = capsys.readouterr().out
    assert "Goes wrong:" in told
    assert re.search(r"sub +Sentences\(count=2, merge=1\)", told)
    assert "python train.py recipe=dreamlip" in told
    assert main(["recipes", "mcl"]) == 0
    typed = " ".join(capsys.readouterr().out.split())
    assert "train.py recipe=mcl model=vit_b16 data.sidecar.stores=[STORE] name=mine" in typed
    assert main(["recipes", "lora"]) == 0
    assert re.search(r"model\.lora\.rank +16", capsys.readouterr().out)


def test_an_unknown_recipe_is_answered_with_those_there_are(capsys):
    assert main(["recipes", "dreamclip"]) == 2
    assert "dreamlip" in capsys.readouterr().err


def test_an_unfinished_recipe_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text("recipe: {}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "opens with no header" in listed
    assert "veclip" in listed


def test_listing_recipes_takes_neither_torch_nor_hydra():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'hydra', 'open_clip', 'numpy']); "
        "from longclip.cli import main; sys.exit(main(['recipes', 'long']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
