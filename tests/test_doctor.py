"""Each broken state is found, named, and answered with what to type; the doctor itself never breaks."""

import json
import shutil
import subprocess
import sys
from array import array
from collections import namedtuple
from pathlib import Path

import pytest

from longclip.cli import main
from longclip.data.scenes import default_tokenizer
from longclip.data.tars import shards
from longclip.doctor import findings, machine, versions
from longclip.doctor.data import data as examine
from longclip.doctor.findings import Finding
from longclip.types import Caption, Record, Sentence

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


def record(key, image):
    return Record(key, image, "jpg", (Caption("raw", "A dog.", (Sentence(0, 6, array("H", (5, 6))),)),), {})


@pytest.fixture
def write(tmp_path, tokenizer):
    """write("train", k1=b"...", ...): a folder of shards with two samples each."""

    def made(name, tokenizer_hash=tokenizer.name_hash, **images):
        records = [record(key, image) for key, image in images.items()]
        shards.write(records, tmp_path / name, 2, tokenizer_hash)
        return tmp_path / name

    return made


def seen(train, benchmarks=(), deep=False, level=None):
    found = examine([str(f) for f in train], [str(f) for f in benchmarks], "ViT-B-16", deep)
    return [f for f in found if level is None or f.level == level]


def problem(train, benchmarks=(), deep=False):
    (found,) = seen(train, benchmarks, deep, "problem")
    return found


FIVE = {f"k{number}": bytes([number]) * 700 for number in range(5)}


def test_good_shards_are_good_also_when_read_in_full(write):
    folder = write("train", **FIVE)
    for deep in (False, True):
        found = seen([folder], deep=deep)
        assert [f.level for f in found] == ["ok", "ok"]
        assert "3 shards, 5 images, 5 captions" in found[0].seen


def test_a_root_of_splits_is_all_looked_at(write, tmp_path):
    write("train", **FIVE)
    write("dev", a=b"1", b=b"2")
    found = seen([tmp_path])
    assert [f.about for f in found] == ["shards", "tokenizer"] * 2 + ["overlap"]
    assert {f.level for f in found} == {"ok"}


@pytest.mark.parametrize("absent", ["000001.tar", "000001.index.json"])
def test_half_a_shard_is_a_problem_that_names_it(write, absent):
    folder = write("train", **FIVE)
    (folder / absent).unlink()
    found = problem([folder])
    assert "000001" in found.seen
    assert "longclip shards" in found.remedy


def test_a_shard_that_the_list_promises_or_does_not_know_is_a_problem(write):
    folder = write("train", **FIVE)
    for name in ("000002.tar", "000002.index.json"):
        (folder / name).unlink()
    assert "000002" in problem([folder]).seen
    folder = write("other", **FIVE)
    for suffix in (".tar", ".index.json"):
        shutil.copy(folder / f"000000{suffix}", folder / f"000009{suffix}")
    assert "000009.tar is not in shards.json" in problem([folder]).seen


def test_a_list_that_disagrees_or_is_absent_is_a_problem(write):
    folder = write("train", **FIVE)
    listed = json.loads((folder / "shards.json").read_text())
    listed["shards"][1]["sha256"] = "0" * 64
    (folder / "shards.json").write_text(json.dumps(listed))
    assert "disagree" in problem([folder]).seen
    (folder / "shards.json").write_text("{}")
    assert "shards.json" in problem([folder]).seen
    (folder / "shards.json").unlink()
    assert ["no shards.json" in f.seen for f in seen([folder], level="warning")] == [True]
    assert not seen([folder], level="problem")


def test_a_truncated_tar_is_a_problem(write):
    folder = write("train", **FIVE)
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "000000.tar" in problem([folder]).seen


def test_a_flipped_bit_is_found_by_deep_alone_which_names_the_sample(write):
    folder = write("train", **FIVE)
    tar = folder / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(bytes([3]) * 700) + 50] ^= 1
    tar.write_bytes(content)
    assert not seen([folder], level="problem")
    assert "1 samples have changed" in problem([folder], deep=True).seen
    assert "'k3'" in problem([folder], deep=True).seen


def test_an_unfinished_folder_is_a_problem_and_is_not_read_further(write):
    folder = write("train", **FIVE)
    (folder / "UNFINISHED").touch()
    assert "UNFINISHED" in problem([folder]).seen
    assert len(seen([folder])) == 1


def test_many_faults_are_counted_not_listed(write):
    folder = write("train", **{f"k{number}": b"x" for number in range(20)})
    for path in folder.glob("*.index.json"):
        path.unlink()
    found = seen([folder], level="problem")
    assert len(found) == 4
    assert "7 more" in found[-1].seen


def test_ids_of_another_tokenizer_are_a_warning_with_both_hashes(write, tokenizer):
    found = seen([write("train", tokenizer_hash="abcdefabcdef", **FIVE)], level="warning")
    assert [f.about for f in found] == ["tokenizer"]
    assert "abcdefabcdef (5)" in found[0].seen
    assert tokenizer.name_hash in found[0].expected


def test_a_judged_image_that_is_trained_on_is_a_problem(write):
    train = write("train", **FIVE)
    judge = write("urban", k9=b"other", k3=FIVE["k3"])
    found = problem([train], [judge])
    assert found.about == "overlap"
    assert "1 images are judged and trained on, first urban/k3 = train/k3" in found.seen


def test_equal_keys_of_different_images_are_no_problem(write):
    train, judge = write("train", **FIVE), write("urban", k1=b"other", k2=b"others")
    (found,) = (f for f in seen([train], [judge]) if f.about == "overlap")
    assert (found.level, "2 keys are equal" in found.seen) == ("ok", True)


def test_equal_keys_in_two_judged_sets_are_both_compared(write):
    train = write("train", **FIVE)
    sets = [write("one", k1=FIVE["k1"]), write("two", k1=b"other")]
    assert "one/k1 = train/k1" in problem([train], sets).seen
    assert "one/k1 = train/k1" in problem([train], sets[::-1]).seen


def test_the_same_image_under_another_key_is_found_by_deep_alone(write):
    train, judge = write("train", **FIVE), write("urban", other=FIVE["k2"])
    assert not seen([train], [judge], level="problem")
    assert "urban/other = train/k2" in problem([train], [judge], deep=True).seen


def test_a_folder_without_shards_is_a_problem(tmp_path):
    assert "with shards in it" in problem([tmp_path]).seen


def test_a_check_that_fails_is_a_finding():
    def broken():
        yield Finding("ok", "thing", "fine so far")
        raise ZeroDivisionError("by zero")

    first, second = findings.run("thing", broken)
    assert first.level == "ok"
    assert (second.level, second.about) == ("problem", "thing")
    assert "ZeroDivisionError: by zero" in second.seen


def test_lines_are_plain_and_cannot_move_the_cursor(capsys):
    assert findings.show([Finding("warning", "a", "seen \x1b[2J", "wanted", "type this")]) is False
    assert findings.show([Finding("problem", "a", "[red]x[/red]")]) is True
    printed = capsys.readouterr().out
    assert "warning  a              seen ?[2J; expected wanted. Type: type this\n" in printed
    assert "[red]x[/red]\n" in printed


Gpu = namedtuple("Gpu", "name total_memory")
Space = namedtuple("Space", "total used free")


@pytest.mark.parametrize(("free", "level"), [(64e6, "problem"), (0.5e9, "warning"), (8e9, "ok")])
def test_little_shared_memory_kills_workers(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Space(1e12, 0, free))
    (found,) = machine.shared_memory(tmp_path)
    assert found.level == level
    assert ("--shm-size" in found.remedy) == (level != "ok")


@pytest.mark.parametrize(("free", "level"), [(1e9, "problem"), (10e9, "warning"), (100e9, "ok")])
def test_a_full_disk_is_found_before_the_run(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Space(1e12, 0, free))
    (found,) = machine.disk([tmp_path / "not" / "there" / "yet"])
    assert (found.level, str(tmp_path) in found.seen) == (level, True)


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    (found,) = machine.disk([tmp_path])
    assert (found.level, "cannot be written" in found.seen) == ("problem", True)


def test_a_cpu_build_beside_a_cuda_build_is_recognised_without_importing_either(monkeypatch):
    builds = {"torch": "2.15.0+cpu", "torchvision": "0.29.2+cu132"}
    monkeypatch.setattr(versions, "build", builds.get)
    monkeypatch.setattr(versions.importlib, "import_module", lambda name: pytest.fail("imported"))
    (found,) = versions.torchvision()
    assert (found.level, found.seen) == ("problem", "torch 2.15.0+cpu beside torchvision 0.29.2+cu132")
    assert "pip install" in found.remedy


def test_a_torchvision_that_dies_at_import_is_recognised(monkeypatch):
    def dies(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(versions.importlib, "import_module", dies)
    (found,) = versions.torchvision()
    assert found.level == "problem"
    assert "built for another torch" in found.seen


def test_builds_are_read_from_files(tmp_path, monkeypatch):
    (tmp_path / "torchfake").mkdir()
    (tmp_path / "torchfake" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torchfake" / "version.py").write_text("__version__ = '9.1.0+cpu'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.build("torchfake") == "9.1.0+cpu"
    assert versions.build("no_such_package") is None


def test_packages_outside_their_ranges_are_named_with_the_range(monkeypatch):
    asked = {"torch": "2.10.0", "lightning": "2.6.6"}
    monkeypatch.setattr(versions.metadata, "requires", lambda name: ["torch>=2.11,<2.16", "lightning>=2.6"])
    monkeypatch.setattr(versions.metadata, "version", asked.__getitem__)
    bad, good = versions.packages()
    assert (bad.level, bad.about, bad.seen) == ("problem", "torch", "2.10.0")
    assert ">=2.11" in bad.expected
    assert (good.level, good.seen) == ("ok", "lightning 2.6.6")


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.9.1")
    (found,) = versions.python()
    assert (found.level, found.expected) == ("problem", ">=3.11")


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    (found,) = machine.devices()
    assert (found.level, "580.1" in found.seen) == ("problem", True)


@pytest.mark.parametrize(("bf16", "level"), [(True, "ok"), (False, "warning")])
def test_a_gpu_is_named_with_its_memory_driver_and_bf16(monkeypatch, bf16, level):
    import torch

    fake = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda number: Gpu("NVIDIA H100", 80 * 10**9),
        "is_bf16_supported": lambda emulated: bf16,
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    (found,) = machine.devices()
    assert found.level == level
    assert "cuda:0 NVIDIA H100, 80 GB, driver 580.1" in found.seen


def test_several_gpus_want_nccl(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert [f.level for f in machine.nccl()] == ["problem"]


def test_few_open_files_are_a_warning(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    (found,) = machine.open_files()
    assert (found.level, found.remedy) == ("warning", "ulimit -n 4096")


@pytest.mark.parametrize(
    ("files", "level"),
    [
        ({"cpu.max": "50000 100000"}, "warning"),
        ({"cpu.max": "max 100000"}, "ok"),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, "warning"),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "ok"),
        ({}, "ok"),
    ],
)
def test_a_quota_below_the_processors_is_a_warning(tmp_path, files, level):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (found,) = machine.processors(tmp_path)
    assert (found.level, "OMP_NUM_THREADS=1" in found.remedy) == (level, level == "warning")


def test_asking_for_the_login_never_prompts(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for input"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert [f.level for f in machine.wandb()] == ["ok"]


def test_the_command_prints_a_line_a_finding_and_exits_with_1_for_a_problem(write, tmp_path, capsys):
    good, arguments = write("train", **FIVE), ["--runs", str(tmp_path / "runs")]
    code = main(["doctor", "--data", str(good), *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert code == int(any(line.startswith("problem") for line in lines))
    assert all(line.split()[0] in ("ok", "warning", "problem") for line in lines)
    for about in ("python", "packages", "torchvision", "devices", "shared memory", "disk", "shards"):
        assert any(f" {about} " in line for line in lines), about
    (good / "000000.tar").unlink()
    assert main(["doctor", "--data", str(good), *arguments]) == 1


def test_it_starts_and_speaks_where_packages_are_missing():
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'webdataset', 'rich', 'open_clip', 'numpy']))"
    )
    code = f"{blocked}; from longclip.cli import main; sys.exit(main(['doctor', '--data', '.']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "devices" in done.stdout
