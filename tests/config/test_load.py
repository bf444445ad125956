"""Finding and loading config files of both kinds, and what is said about faulty ones."""

import builtins
import json
import textwrap

import pytest
import torch

from d2ext.config import (
    check_registered_names,
    get_cfg,
    get_config,
    get_config_file,
    is_lazy,
    load_config,
    register_config,
)
from d2ext.config import projects as projects_module
from d2ext.config.load import config_roots
from d2ext.errors import UserError

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.file_io import PathManager

LAZY = """
from d2ext.config import get_config

train = get_config("common/train.py").train
train.max_iter = 7
_hidden = dict(number=3)
model, dataloader, optimizer = _hidden, dict(), dict()
lr_multiplier = dict(steps="${train.max_iter}")
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def message(path, *overrides):
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# -------------------------------------------------------------------------------------------------
# what works


def test_yaml_files_give_a_cfg_node_with_bases_and_overrides(write):
    write("base.yaml", "SOLVER: {MAX_ITER: 5, BASE_LR: 1e-4}\nVERSION: 2")
    path = write("top.yaml", "_BASE_: base.yaml\nOUTPUT_DIR: out\nVERSION: 2")
    cfg = load_config(path, ["LOG_PERIOD=3"])
    assert isinstance(cfg, CfgNode) and not is_lazy(cfg)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.OUTPUT_DIR) == (5, 1e-4, "out")
    assert cfg.LOG_PERIOD == 3


def test_the_short_suffix_of_yaml_works(write):
    assert load_config(write("a.yml", "SEED: 3\nVERSION: 2")).SEED == 3


def test_python_files_give_their_dicts_with_overrides(write):
    cfg = load_config(write("a.py", LAZY), ["train.seed=3"])
    assert is_lazy(cfg)
    assert set(cfg) == {"train", "model", "dataloader", "optimizer", "lr_multiplier"}
    assert (cfg.train.seed, cfg.model.number, cfg.lr_multiplier.steps) == (3, 3, 7)


def test_two_loads_of_a_file_share_nothing(write):
    path = write("a.py", LAZY)
    load_config(path).train.max_iter = 1
    assert load_config(path).train.max_iter == 7


def test_the_config_that_a_lazy_run_saves_is_lazy_again(write, tmp_path):
    saved = str(tmp_path / "config.yaml")
    LazyConfig.save(load_config(get_config_file("mask_rcnn_tiny.py"), ["train.seed=3"]), saved)
    cfg = load_config(saved, ["train.max_iter=5"])
    assert is_lazy(cfg)
    assert (cfg.train.seed, cfg.lr_multiplier.max_iter) == (3, 5)
    assert cfg.model.roi_heads.box_predictor.num_classes == 8


def test_the_config_that_a_yaml_run_saves_is_loaded_as_it_was(tmp_path):
    cfg = load_config(get_config_file("cascade_mask_rcnn_tiny.yaml"), ["SEED=3"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(tmp_path / "config.yaml")
    assert json.dumps(again) == json.dumps(cfg)  # yaml makes lists of inner tuples


@pytest.mark.parametrize("tag", ["object/apply:builtins.open", "object/new:io.FileIO"])
@pytest.mark.parametrize("holder", ["SEED: {}", "_BASE_: [base.yaml]", "model: {}\ntrain: 1"])
def test_a_yaml_file_that_asks_for_python_is_refused_in_one_line(write, tmp_path, tag, holder):
    made = tmp_path / "made"
    order = f"!!python/{tag} [{made}, 'w']"
    write("base.yaml", f"SEED: {order}")
    with pytest.raises(UserError) as error:
        load_config(write("a.yaml", holder.format(order)))
    assert not made.exists()
    text = str(error.value)
    assert "\n" not in text and "a.yaml', line 1" in text.replace("base.yaml", "a.yaml")
    assert "python/object" in text and "run no code" in text


def test_a_saved_lazy_config_may_hold_classes_and_tuples(write):
    model = "{norm: !!python/name:torch.nn.BatchNorm2d '', size: !!python/tuple [1, 2]}"
    rest = "train: {}\ndataloader: {}\noptimizer: {}\nlr_multiplier: {}"
    cfg = load_config(write("a.yaml", f"model: {model}\n{rest}"))
    assert cfg.model.norm is torch.nn.BatchNorm2d and list(cfg.model.size) == [1, 2]


def test_too_deep_a_yaml_file_is_one_line(write):
    with pytest.raises(UserError, match="too many brackets"):
        load_config(write("a.yaml", "SEED: " + "[" * 5000))


def test_shared_configs_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_config("common/train.py").train.log_period == 20
    assert load_config(get_config_file("mask_rcnn_tiny.yaml")).MODEL.MASK_ON
    assert config_roots()[0].name == "configs"


def test_shipped_files_have_an_address_of_their_own():
    path = get_config_file("common/train.py")
    assert PathManager.get_local_path("d2ext://common/train.py") == path
    assert PathManager.isfile("d2ext://common/train.py")
    assert not PathManager.isfile("d2ext://common/absent.py")
    with PathManager.open("d2ext://common/train.py") as f, open(path) as expected:
        assert f.read() == expected.read()


def test_a_shipped_config_is_the_base_of_one_that_lies_elsewhere(write):
    base = load_config(get_config_file("mask_rcnn_tiny.yaml"))  # which has bases of its own
    cfg = load_config(write("own.yaml", "_BASE_: d2ext://mask_rcnn_tiny.yaml\nSEED: 7"))
    assert cfg.SEED == 7 and base.SEED != 7
    base.SEED = 7
    assert json.dumps(cfg) == json.dumps(base)


# -------------------------------------------------------------------------------------------------
# what does not


def test_a_missing_file_is_named_with_its_neighbours(write, tmp_path):
    write("mask_tiny.yaml", "")
    text = message(str(tmp_path / "mask_tinny.yaml"))
    assert text.startswith(f"config file '{tmp_path}/mask_tinny.yaml' does not exist (nearest: ")
    assert f"{tmp_path}/mask_tiny.yaml" in text
    assert message("/absent/folder/a.yaml") == "config file '/absent/folder/a.yaml' does not exist"
    assert "does not exist" in message(str(tmp_path))


def test_a_missing_shared_config_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no shared config 'common/trian.py' \(nearest: common/tr"):
        get_config("common/trian.py")


def test_a_missing_shipped_base_is_named_with_the_file_and_the_nearest(write):
    path = write("own.yaml", "_BASE_: d2ext://mask_rcnn_tinny.yaml")
    text = message(path)
    assert text.startswith(f"config file '{path}', _BASE_: no shared config 'mask_rcnn_tinny.yaml'")
    assert "(nearest: mask_rcnn_tiny" in text


def test_another_suffix_is_refused(write):
    path = write("a.json", "{}")
    assert message(path) == f"config file '{path}' must end in .yaml or .py"


YAML_ERRORS = {
    "": "is not a list of 'KEY: value' lines",
    "- a\n- b": "is not a list of 'KEY: value' lines",
    "text": "is not a list of 'KEY: value' lines",
    "3: 4\nVERSION: 2": "is not a list of 'KEY: value' lines",
    "MODEL:\n  A: [1\n  B: 2": "line 3: expected ',' or ']'",
    "MODEL:\n\tA: 1": "line 2: found character",
    "\0": "is not valid yaml",
    "MODEL: {WEIGHT: a}\nVERSION: 2": "no such key MODEL.WEIGHT (nearest: MODEL.WEIGHTS",
    "SOLVR: {MAX_ITER: 3}\nVERSION: 2": "no such key SOLVR (nearest: SOLVER)",
    "SOLVER: {MAX_ITER: a}\nVERSION: 2": "SOLVER.MAX_ITER takes a whole number such as 40000",
    "SOLVER: {BASE_LR: 1}\nVERSION: 2": "SOLVER.BASE_LR takes a number with a decimal point such",
    "SOLVER: {STEPS: 3}\nVERSION: 2": "SOLVER.STEPS takes a list such as (30000,)",
    "MODEL: 3\nVERSION: 2": "MODEL is a group of keys, set one of them",
    "MODEL:\nVERSION: 2": "MODEL is a group of keys, set one of them",
    "VERSION: 9": "Cannot merge a v9 config into a v2 config",
    "_BASE_: absent.yaml": "its _BASE_ '{folder}/absent.yaml' does not exist",
    "_BASE_: a.yaml": "its _BASE_ leads back to itself",
    "_BASE_: broken.yaml": "broken.yaml', line 2: found character",
}


@pytest.mark.parametrize("text", YAML_ERRORS)
def test_a_fault_in_a_yaml_file_is_one_line_with_file_and_place(text, write, tmp_path):
    write("broken.yaml", "MODEL:\n\tA: 1")
    path = write("a.yaml", text)
    found = message(path)
    assert YAML_ERRORS[text].format(folder=tmp_path) in found
    assert found.startswith(f"config file '{tmp_path}/")


LAZY_ERRORS = {
    "x = 1\nmodel = [\n": "/a.py', line 2: '[' was never closed",
    "from .broken import y": "/broken.py', line 2: ",
    "\n\nmodel = absent": "/a.py', line 3: NameError: name 'absent' is not defined",
    "1 / 0": "/a.py', line 1: ZeroDivisionError: division by zero",
    "\nfrom .absent import y": "/a.py', line 2: ImportError: Cannot import name absent from",
    "\nimport package_that_is_absent": "/a.py', line 2: ModuleNotFoundError: No module named",
    "from d2ext.config import get_config\nx = get_config('common/trian.py')": (
        "/a.py', line 2: no shared config 'common/trian.py' (nearest: common/train.py"
    ),
    "model = dict()": "/a.py' does not define dataloader, lr_multiplier, optimizer, train",
}


@pytest.mark.parametrize("text", LAZY_ERRORS)
def test_a_fault_in_a_python_file_is_one_line_with_file_and_place(text, write, tmp_path):
    write("broken.py", "x = 1\nif x\n")
    found = message(write("a.py", text))
    assert found.startswith(f"config file '{tmp_path}/") and LAZY_ERRORS[text] in found


def test_a_fault_in_a_python_file_leaves_the_import_function_as_it_was(write):
    before = builtins.__import__
    message(write("a.py", "1 / 0"))
    assert builtins.__import__ is before


def test_an_incomplete_saved_lazy_config_is_named(write):
    found = message(write("a.yaml", "model: {a: 1}\ntrain: {seed: 2}"))
    assert "does not define dataloader, lr_multiplier, optimizer" in found


def test_faulty_overrides_are_found_for_both_kinds(write):
    assert "no such key (nearest: SEED" in message(write("a.yaml", "VERSION: 2"), "SEEED=3")
    assert "no such key (nearest: train.seed" in message(write("a.py", LAZY), "train.sed=3")


# -------------------------------------------------------------------------------------------------
# projects and registered names


@pytest.fixture
def registered(monkeypatch):
    """Config functions are global: undo what a test registers."""
    monkeypatch.setattr(projects_module, "_CONFIG_FUNCTIONS", [])


def test_keys_of_registered_projects_are_known_to_every_yaml_config(registered, write):
    path = write("a.yaml", "MODEL: {TOY: {SIZE: 5}}\nVERSION: 2")
    assert "no such key MODEL.TOY" in message(path)

    @register_config
    def add_toy_config(cfg):
        cfg.MODEL.TOY = CfgNode({"SIZE": 3})

    register_config(add_toy_config)  # twice is once
    assert get_cfg().MODEL.TOY.SIZE == 3
    assert load_config(path).MODEL.TOY.SIZE == 5


NAMES = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
    "MODEL.RPN.HEAD_NAME": "StandardRPNHead",
    "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "KRCNNConvDeconvUpsampleHead",
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
}


@pytest.mark.parametrize("key", NAMES)
def test_a_misspelt_registered_name_is_named_with_the_nearest(key, write):
    check_registered_names(load_config(write("a.yaml", "VERSION: 2"), [f"{key}={NAMES[key]}"]))
    cfg = load_config(write("a.yaml", "VERSION: 2"), [f"{key}={NAMES[key]}x"])
    with pytest.raises(UserError) as error:
        check_registered_names(cfg)
    start = f"{key} is '{NAMES[key]}x', which is not registered (nearest: {NAMES[key]}"
    assert str(error.value).startswith(start)


def test_a_box_head_must_be_named_for_the_heads_that_look_it_up(write):
    path = write("a.yaml", "MODEL: {ROI_HEADS: {NAME: StandardROIHeads}}\nVERSION: 2")
    with pytest.raises(UserError, match="MODEL.ROI_BOX_HEAD.NAME is ''"):
        check_registered_names(load_config(path))
