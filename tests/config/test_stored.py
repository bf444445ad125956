"""The config inside a checkpoint: read as data, and nothing but parts of networks is called."""

import pytest
import yaml
from omegaconf import OmegaConf

from d2ext.config import load_config
from d2ext.config.stored import flat_settings, load_stored_config
from d2ext.errors import UserError

from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec


def lazy_text(**model):
    """A lazy config with a model of one's own."""
    nodes = {"optimizer": {}, "lr_multiplier": {}, "train": {"output_dir": "x"}}
    nodes["dataloader"] = {"test": {"mapper": {"augmentations": []}}}
    return yaml.safe_dump({**nodes, "model": model})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "detectron2.config.LazyConfig.load",
        "detectron2.utils.file_io.PathManager.rm",
        "detectron2.modeling.mmdet_wrapper.MMDetBackbone",
        # Through a module into one that it imports.
        "torch.nn.modules.module.torch.load",
        "d2ext.modeling.test_time_augmentation.copy.copy",
        "d2ext.ops.poolers.torch.load",
        "torch.nn.functional.importlib.import_module",
        # Of allowed packages, but no part of a network.
        "d2ext.ops._library.load_kernels",
        "d2ext.engine.main",
        "${train.output_dir}",
        7,
    ],
)
def test_nothing_but_parts_of_networks_is_called(target):
    for text in (
        lazy_text(_target_=target, command="touch executed"),
        lazy_text(_target_="torch.nn.Sequential", a=[{"_target_": target}]),
    ):
        with pytest.raises(UserError, match="^the config inside 'x.pth' (calls|uses) '"):
            load_stored_config(text, "x.pth")


def test_a_function_given_as_a_value_is_checked_too():
    text = lazy_text(_target_="torch.nn.Sequential")
    bad = text.replace("_target_: ", "act: !!python/name:os.system ''\n  _target_: ")
    with pytest.raises(UserError, match="calls 'os.system', which is no part of a network"):
        load_stored_config(bad, "x.pth")
    made = text.replace("_target_: ", "act: !!python/object/apply:os.system [a]\n  _target_: ")
    with pytest.raises(UserError, match="calls '!!python/object/apply:os.system'"):
        load_stored_config(made, "x.pth")
    assert flat_settings(made, "x.pth")["model.act"] == "!!python/object/apply:os.system"
    good = text.replace("_target_: ", "act: !!python/name:torch.nn.ReLU ''\n  _target_: ")
    assert load_stored_config(good, "x.pth").model.act.__name__ == "ReLU"


def test_what_is_no_part_of_the_model_cannot_be_called_at_all():
    content = yaml.safe_load(lazy_text(_target_="torch.nn.Identity"))
    content["optimizer"] = {"_target_": "os.system", "command": "touch executed"}
    content["dataloader"]["train"] = {"mapper": [{"_target_": "os.system"}]}
    cfg = load_stored_config(yaml.safe_dump(content), "x.pth")
    assert cfg.optimizer == {"command": "touch executed"}
    assert "_target_" not in cfg.dataloader.train.mapper[0]
    assert type(instantiate(cfg.model)).__name__ == "Identity"


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a", "not a list"),
        ("a: [", "cannot be read"),
        ("just text", "not a list"),
        ("MODEL: !!python/object/apply:os.system ['touch executed']", "yaml configs run no code"),
        ("_BASE_: /etc/passwd", "another file"),
        ("MODEL: {NO_SUCH_KEY: 1}", "no such key MODEL.NO_SUCH_KEY.*project"),
        ("a: &a [*a]", "cannot be read"),
        ("model: {}\ntrain: {}", "lacks dataloader, lr_multiplier, optimizer"),
    ],
)
def test_text_that_is_no_config_is_refused_in_one_line(text, words):
    with pytest.raises(UserError, match=words) as error:
        load_stored_config(text, "x.pth")
    assert "x.pth" in str(error.value) and "\n" not in str(error.value)


def test_a_text_that_repeats_itself_costs_no_memory():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(UserError, match="too many settings"):
        flat_settings("\n".join(lines), "x.pth")


@pytest.mark.parametrize("name", ["mask_rcnn_tiny.py", "cascade_mask_rcnn_tiny.yaml"])
def test_settings_of_a_config_come_back(request, tmp_path, name):
    cfg = load_config(str(request.config.rootpath / "configs" / name), ["TEST.METRICS=[coco]"])
    path = tmp_path / "config.yaml"
    if OmegaConf.is_config(cfg):
        LazyConfig.save(cfg, str(path))
    else:
        path.write_text(cfg.dump())
    flat = flat_settings(path.read_text(), "x.pth")
    found = load_stored_config(path.read_text(), "x.pth", ["SEED=7"])
    if OmegaConf.is_config(cfg):
        assert flat["model.roi_heads.box_predictor.num_classes"] == cfg.model.roi_heads.num_classes
        assert found.train.seed == 7 and found.model == cfg.model
        shape = instantiate(found.model.roi_heads.box_head.input_shape)
        assert shape == ShapeSpec(channels=64, height=7, width=7)
    else:
        assert flat["MODEL.ANCHOR_GENERATOR.SIZES"] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
        assert found.SEED == 7 and found.dump() == load_config(str(path), ["SEED=7"]).dump()
