"""The note that the first failing process leaves, and what the others say."""

import errno
import os

import pytest
from torch.distributed import DistStoreError

from longclip import failing
from longclip.failing import Together, who_was_first
from longclip.types import Elsewhere, UserError

LOST = RuntimeError("Connection closed by peer")


def test_the_first_speaks_for_itself_and_the_others_repeat_it(tmp_path):
    note = tmp_path / "failure.txt"
    assert who_was_first(note, UserError("the disk is full")) is None
    for later in (UserError("the disk is full here, too"), LOST, Elsewhere("look elsewhere")):
        assert who_was_first(note, later).endswith("the disk is full")
    assert os.listdir(tmp_path) == ["failure.txt"]


def test_who_only_knows_that_another_failed_leaves_no_note(tmp_path, monkeypatch):
    monkeypatch.setattr(failing, "PATIENCE", 0.1)
    assert who_was_first(tmp_path / "failure.txt", Elsewhere("its message says why")) is None
    assert "none of them left a message" in who_was_first(tmp_path / "failure.txt", LOST)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_note_hides_no_failure(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert who_was_first(tmp_path / "failure.txt", UserError("the disk is full")) is None
    assert os.listdir(tmp_path) == []


def test_processes_that_never_met_are_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"did not all meet \(1/2 clients joined\).*resume=auto"):
        Together(tmp_path).on_exception(None, None, DistStoreError("1/2 clients joined"))
