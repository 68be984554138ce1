"""Every command of README.md and docs/*.md is understood by its program, and run here or accounted for.

A command is run (small, in a folder of stand-ins), or its remark says what it NEEDS, or another test runs it
(ELSEWHERE), or its program is not ours (OTHERS). Links and pictures lead somewhere.
"""

import ast
import importlib
import json
import re
import shutil
import tarfile
from pathlib import Path

import project
import pytest
from commands import ROOT, check, of_page, type_in

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [command for page in PAGES for command in of_page(page)]
NEEDS = ("needs a download", "needs a GPU", "needs SLURM", "needs an account", "needs a token")
OTHERS = ("git", "make", "pip", "python3", ".", "export", "wandb", "sbatch", "printf", "cd")
ELSEWHERE = {
    r"python train.py|make demo": "test_run.py::test_a_run_says_what_it_will_do",
    r"python train.py .*logger=wandb.*": "test_wandb.py::test_a_training_and_its_resume_are_one_run",
    r"python train.py .*trainer=ddp.*": "test_run.py::test_a_run_of_two_whose_one_is_killed",
    r"python train.py .* -m": "test_trainings.py::test_the_jobs_of_a_sweep",
    r"torchrun .*train.py .*": "test_launching.py::test_a_signal_to_one_of_two_ranks",
    r"(RANK|export RANK|export WORLD_SIZE).*": "test_launching.py::test_a_signal_to_one_of_two_ranks",
    r"torchrun .* -m eval.run .*": "test_run.py::test_judging_the_export_offline_on_two_processes",
    r"torchrun .* -m longclip.preflight .*": "test_preflight.py::test_processes_that_agree_are_fit",
    r"python train.py .*s3://.*": "data/test_dataset.py::test_s3_gives_the_batches_of_the_disk",
    r"python train.py data=stream .*": "data/test_stream.py::test_the_samples_are_those",
    r"longclip search .* --serve": "search/test_search_page.py::test_the_server_forbids_scripts",
    r"longclip embed .*": "test_embedding.py::test_the_command_says_what_to_type_next",
    r"python train.py recipe=mobileclip2 .*": "test_embedding.py::test_a_recipe_finds_the_embeddings",
    r"longclip facets .*": "test_facets_sidecar.py::test_the_command_says_what_to_type_next",
    r"python train.py recipe=flame .*": "test_facets_sidecar.py::test_the_command_says_what_to_type_next",
    r"longclip cluster .*": "data/test_clusters.py::test_the_command_says_what_to_type_next",
    r"python train.py recipe=clipmoe .*": "towers/test_experts.py::test_finished_models_are_the_experts",
    r"python train.py recipe=mcl .*": "data/test_clusters.py::test_a_batch_is_of_one_cluster",
    r"longclip import .*": "export/test_export.py::test_imported_long_clip_keeps_its_features",
    r"longclip export .* --format .*": "export/test_export.py::test_every_format_gives_the_same_ids",
    r"python -m benchmarks.plots .*": "test_benchmarks.py::test_the_picture_shows_costs",
    r"python -m benchmarks.gpu.*": "test_benchmarks.py::test_the_gpu_benchmark_runs_up_to_the_device",
    r"python -m benchmarks.mosaics .*": "test_benchmark_recipes.py::test_every_sentence_of_a_mosaic",
    r"python -m benchmarks.finetuning .*": "test_benchmark_recipes.py::test_fine_tuning_is_told",
    r"python -m benchmarks.scaling .*": "test_scaling.py::test_the_document_holds_what_the_script_prints",
    r"python -m benchmarks( .*)?": "test_benchmarks.py::test_a_quick_run_tells_every_figure",
}
"""What a command looks like, and the beginning of the test that runs such ones."""
PLACEHOLDERS = {"SRC": "my_photos", "NAME": "jsonl", "DIR": "datasets/new"}
MORE = {
    "recipe=longclip": ["recipe.terms.short.k=2"],
    "curriculum=clipa": ["curriculum.image_size=[[0,12],[0.8,null]]"],
}
"""What a command with these words needs besides, to be small."""


def elsewhere(command):
    return next((test for form, test in ELSEWHERE.items() if re.fullmatch(form, command.text)), None)


def accounted(command):
    """Whether it is not for this file to run."""
    needs = any(need in command.remark for need in NEEDS)
    return needs or command.program in OTHERS or elsewhere(command) is not None


def ident(command):
    return f"{Path(command.page).stem}: {command.text}"[:80]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A project with everything that the pages name."""
    folder = project.make(tmp_path_factory.mktemp("project"))
    with project.inside(folder):
        project.typed("python -m eval.run model=runs/mine report=false")
        for name in ("runs/demo", "runs/a", "runs/b", "runs/c", "runs/other"):
            shutil.copytree("runs/mine", name)
        for name in ("datasets/cc12m", "datasets/docci", "datasets/flickr8k"):
            shutil.copytree("datasets/mine", name)
        for name in ("photos", "questions", "birds/robin", "birds/wren"):
            shutil.copytree("my_photos", name)
        shutil.copytree("exports/mine", "exports/mean")
        Path("queries.txt").write_text("Waves of three colours.\nA dog. It sleeps.\n")
        question = {"image": "0.jpg", "caption": "soft waves", "negatives": ["a dog"], "kind": "swap"}
        Path("questions/questions.jsonl").write_text(json.dumps(question) + "\n")
        with tarfile.open("flickr8k_112.tar", "w") as tar:
            tar.add("my_photos", ".")
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    project.beside(whole, tmp_path)
    for path in [*whole.glob("*"), *whole.glob("*/*")]:
        own = tmp_path / path.relative_to(whole)
        if not own.exists():
            own.symlink_to(path)
    monkeypatch.chdir(tmp_path)


def make_room(command):
    """What a command makes is not there yet; what it goes on with is its own."""
    words = dict(word.split("=", 1) for word in command.arguments if "=" in word)
    made = [f"runs/{words.get('name', 'demo')}"] if command.program == "train.py" else []
    if "--out" in command.arguments and command.program == "longclip":
        made.append(command.arguments[command.arguments.index("--out") + 1])
    for path in map(Path, made):
        if path.is_symlink():
            kept = path.resolve()
            path.unlink()
            if "resume" in words:
                shutil.copytree(kept, path)


def filled(command):
    """The same command with names for its placeholders."""
    return command._replace(text=" ".join(PLACEHOLDERS.get(word, word) for word in command.text.split()))


def heavy(command):
    """Benchmarks import what they measure before they read a word."""
    marks = [pytest.mark.long] if command.program.startswith("benchmarks") else []
    return pytest.param(command, marks=marks, id=ident(command))


@pytest.mark.parametrize("command", [heavy(c) for c in COMMANDS if c.program not in OTHERS])
def test_a_command_is_understood(command):
    check(filled(command))


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in COMMANDS if not accounted(c)], ids=ident)
def test_a_command_runs(command, here):
    command = filled(command)
    make_room(command)
    more = [word for words, add in MORE.items() if words in command.arguments for word in add]
    with project.unproven():
        answer = type_in(command, *project.small(command), *more)
    passed = (0, 1) if "doctor" in command.arguments else (0,)  # 1: it found something to say
    assert answer.code in passed, answer.printed
    assert "Traceback" not in answer.printed, answer.printed


def test_the_tests_that_run_commands_elsewhere_are_there():
    for test in set(ELSEWHERE.values()):
        file, name = test.split("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(), test


def test_every_form_of_a_command_run_elsewhere_is_on_a_page():
    for form in ELSEWHERE:
        assert any(re.fullmatch(form, command.text) for command in COMMANDS), form


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_is_python_and_finds_what_it_imports(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longclip"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path) if path else page
        assert aim.exists(), target
        assert not anchor or anchor in anchors(aim), target


def anchors(page):
    """The headings of a page, as GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index]
    assert not missing
