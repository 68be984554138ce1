"""A checkpoint folder: the whole is read back exactly, the torn recognised, none left half done."""

import logging

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from longclip import runs, stored
from longclip.stored import Stored, owners, why_not_whole, write_share
from longclip.types import UserError

TENSORS = {
    "weights/a": torch.arange(6.0).reshape(2, 3),
    "weights/b": torch.ones(1),
    "step/a": torch.tensor(7.0),
}
VALUES = {"stamp": "x", "global_step": 3, "longclip": {"rate": 0.1 + 0.2}}


def write(folder, world=2, tensors=TENSORS, values=VALUES):
    own = owners({name: tensor.shape for name, tensor in tensors.items()}, world)
    for rank in range(world):
        share = {name: tensor for name, tensor in tensors.items() if own[name] == rank}
        write_share(folder, rank, world, share, values)
    return folder


@pytest.mark.parametrize("world", [1, 2, 5])
def test_what_is_written_is_read_back_exactly(tmp_path, world):
    found = Stored(write(tmp_path / "s.ckpt", world))
    assert found.values == VALUES
    assert found.world == world
    assert found.shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(found.read(name), tensor)
    assert set(found.read_all("weights")) == {"a", "b"}


def torn_by_a_missing_share(folder):
    sorted(folder.iterdir())[0].unlink()


def torn_by_a_short_share(folder):
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-3])


def torn_by_an_empty_share(folder):
    sorted(folder.iterdir())[1].write_bytes(b"")


def torn_by_a_share_of_another_save(folder):
    write_share(folder, 1, 2, {}, VALUES | {"stamp": "y"})


def torn_by_shares_of_two_sizes(folder):
    write_share(folder, 0, 3, {}, VALUES)


TEARS = [
    torn_by_a_missing_share,
    torn_by_a_short_share,
    torn_by_an_empty_share,
    torn_by_a_share_of_another_save,
    torn_by_shares_of_two_sizes,
]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_recognised_and_the_one_before_it_found(tmp_path, caplog, tear):
    folder = tmp_path / "checkpoints"
    good = write(folder / runs.checkpoint_name(10))
    tear(write(folder / runs.checkpoint_name(20)))
    assert runs.newest_checkpoint(tmp_path) == good
    assert "passed over" in caplog.text
    assert "step-000000020.ckpt is torn" in caplog.text


def test_the_newest_whole_one_is_found_without_a_word(tmp_path, caplog):
    for step in (9, 10, 100):
        write(tmp_path / "checkpoints" / runs.checkpoint_name(step))
    with caplog.at_level(logging.INFO):
        assert runs.newest_checkpoint(tmp_path).name == runs.checkpoint_name(100)
    assert not caplog.text


def test_a_file_of_others_is_refused(tmp_path):
    (tmp_path / "folder.ckpt").mkdir()
    save_file(TENSORS, tmp_path / "folder.ckpt" / "00001-of-00001.safetensors")
    torch.save({}, tmp_path / "file.ckpt")
    for name in ("folder.ckpt", "file.ckpt"):
        with pytest.raises(UserError, match="longclip import"):
            Stored(tmp_path / name)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fill(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(stored, "save_file", fill)
    with pytest.raises(OSError, match="No space left") as raised:
        write_share(tmp_path / "s.ckpt", 0, 1, TENSORS, VALUES)
    assert raised.value.errno == 28
    assert list((tmp_path / "s.ckpt").iterdir()) == []
    assert "0 of ? files" in why_not_whole(tmp_path / "s.ckpt")


def test_every_tensor_has_one_owner_and_the_shares_are_about_equal():
    shapes = {str(n): torch.Size([n % 17 + 1, 10]) for n in range(200)}
    own = owners(shapes, 4)
    assert own.keys() == shapes.keys()
    sizes = [sum(shapes[n].numel() for n, rank in own.items() if rank == r) for r in range(4)]
    assert max(sizes) - min(sizes) <= 2 * 170
    assert set(owners({"a": torch.Size([0])}, 3).values()) == {0}
