"""Configs and model folders name what is ours, and bring no code along."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from conf import launch
from eval.leaks import trained_on
from eval.own import judged_as_trained
from longclip import models
from longclip.cli import main
from longclip.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "longclip.data.tars.dataset.os.system",
        "longclip.training.torch.load",
        "lightning.pytorch.LightningModule.load_from_checkpoint",
        "lightning.fabric.utilities.cloud_io._load",
        "torch.load",
        "hydra.utils.call",
        "longclip_evil.Thing",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_cannot_name_what_is_not_ours(marker, target, nested):
    node = {"_target_": target, "_args_": [f"touch {marker}"]}
    node = {"a": [{"b": node}]} if nested else node
    with pytest.raises(UserError, match="the config names"):
        launch.instantiate(OmegaConf.create(node))


def test_an_interpolated_target_is_no_way_around(marker, monkeypatch):
    monkeypatch.setenv("EVIL", "os.system")
    with pytest.raises(UserError, match=r"os\.system"):
        launch.instantiate(OmegaConf.create({"_target_": "${oc.env:EVIL}", "command": f"touch {marker}"}))


def test_a_users_own_package_is_named_once_and_then_works(tmp_path, monkeypatch):
    (tmp_path / "mylab.py").write_text("class Loss:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = OmegaConf.create({"_target_": "mylab.Loss"})
    with pytest.raises(UserError, match="LONGCLIP_TARGETS=mylab"):
        launch.instantiate(node)
    monkeypatch.setenv("LONGCLIP_TARGETS", "mylab")
    assert type(launch.instantiate(node)).__name__ == "Loss"


def test_a_run_of_somebody_else_is_judged_without_looking_at_its_config(tmp_path, marker):
    """eval.run builds what conf/ and the command line say, the model from the checkpoint alone."""
    (tmp_path / "checkpoints").mkdir()
    evil = {"_target_": "os.system", "command": f"touch {marker}"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": evil, "model": evil, "recipe": evil}))
    with pytest.raises(UserError, match="no checkpoint"):
        models.load(str(tmp_path))
    assert main(["preview", str(tmp_path), "--recipe", str(tmp_path)]) == 2
    assert trained_on(str(tmp_path)) == []  # what eval.run reads of it: names of folders, nothing is built
    for path in (ROOT / "eval").rglob("*.py"):
        assert "config.yaml" not in path.read_text() or path.name in ("leaks.py", "own.py"), path
    assert "config.yaml" not in (ROOT / "longclip" / "models.py").read_text()


@pytest.mark.parametrize(
    "data",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "longclip.data.tars.shards.Writer", "directory": "x"},
        {"_target_": "longclip.data.module.DataModule", "augment": {"_target_": "longclip.export.push.push"}},
        {"_target_": "longclip.data.module.DataModule", "root": "http://evil/${oc.env:HOME}"},
    ],
)
def test_a_run_of_somebody_else_chooses_what_it_is_judged_on_among_ours(tmp_path, data):
    theirs = {"data": data, "benchmark": {"x": {"_target_": "longclip.evaluate.Retrieval"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(theirs))
    config = OmegaConf.create({"source": str(tmp_path), "data": {}, "benchmark": {}})
    with pytest.raises(UserError, match=r"may be anybody's: choose data=\.\.\. and benchmark=\.\.\."):
        judged_as_trained(config, [])
    theirs["data"] = {"_target_": "longclip.data.module.DataModule", "prepare": {"_target_": "evil"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(theirs))
    assert judged_as_trained(config, []).data.prepare is None, "nothing is made"


def test_a_model_folder_cannot_have_its_own_code_run(tmp_path, marker, tiny):
    import open_clip

    config = open_clip.get_model_config(tiny)
    config["text_cfg"]["hf_tokenizer_name"] = "evil"
    config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    model = open_clip.create_model(tiny)
    from safetensors.torch import save_file

    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        models.load(str(tmp_path))
