"""The override grammar: what people type, applied to configs of both kinds."""

import copy
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from d2ext.config import get_cfg, load_config
from d2ext.config.overrides import (
    LAZY_TO_YAML,
    YAML_TO_LAZY,
    apply_to_lazy,
    apply_to_yaml,
    lazy_keys,
    nearest,
    parse_overrides,
    yaml_keys,
)
from d2ext.config.values import parse_value
from d2ext.errors import UserError

from detectron2.config import instantiate

LAZY = OmegaConf.create(
    {
        "train": {
            "max_iter": 100,
            "seed": 42,
            "output_dir": "./output",
            "init_checkpoint": "",
            "amp": {"enabled": False},
            "ddp": {},
        },
        "optimizer": {"lr": 0.02, "weight_decay_norm": 0.0, "clip_gradients": None},
        "lr_multiplier": {"max_iter": "${train.max_iter}", "milestones": [60, 80]},
        "dataloader": {
            "register": [],
            "train": {
                "dataset": "shapes_train",
                "semantic": "auto",
                "augmentations": [{"length": [640, 800], "max_size": 1333}, {"flip": True}],
            },
            "test": {"dataset": "shapes_val"},
        },
        "model": {"pixel_mean": [103.5, 116.3, 123.7], "names": ["p2", "p3"], "build": "???"},
    }
)


def lazy(*overrides):
    cfg = copy.deepcopy(LAZY)
    apply_to_lazy(cfg, parse_overrides(overrides))
    return cfg


def yaml(*overrides):
    cfg = get_cfg()
    apply_to_yaml(cfg, parse_overrides(overrides))
    return cfg


def both(*overrides, key):
    """Values of a setting with a name in both kinds, set under its yaml name."""
    node = yaml(*overrides)
    for part in key.split("."):
        node = node[part]
    return node, OmegaConf.select(lazy(*overrides), YAML_TO_LAZY[key])


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("-3", -3),
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("", ""),
        ("word", "word"),
        ("'3'", "3"),
        ('"two words"', "two words"),
        ("007", "007"),
        ("1.2.3", "1.2.3"),
        ("/a/b=c", "/a/b=c"),
        ("...", "..."),
        ("[1, 2]", [1, 2]),
        ("(1, 2)", (1, 2)),
        ("()", ()),
        ("[a, b]", ["a", "b"]),
        ("(a,b)", ["a", "b"]),
        ("[[a,1e-4],[no,true]]", [["a", 1e-4], ["no", True]]),
        ("{type: norm, value: 1.0}", {"type": "norm", "value": 1.0}),
        ("[a", "[a"),
        ("[a}", "[a}"),
    ],
)
def test_text_is_read_as_literal_or_list_of_words_or_text(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, value", [("-1", -1), ("9e1", 90), ("1_000", 1000), ("+5", 5)])
def test_whole_numbers_stay_whole(text, value):
    for found in both(f"SEED={text}", key="SEED"):
        assert found == value and type(found) is int


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("-2", -2.0)])
def test_fractional_numbers_stay_fractional(text, value):
    for found in both(f"SOLVER.BASE_LR={text}", key="SOLVER.BASE_LR"):
        assert found == value and type(found) is float


@pytest.mark.parametrize(
    "text", ["2024", "1e-4", "true", "/tmp/run=3,b", "[a]", "-x", "", "a b", "C:\\x"]
)
def test_text_settings_take_every_text_as_it_is(text):
    assert both(f"OUTPUT_DIR={text}", key="OUTPUT_DIR") == (text, text)


def test_quotes_around_text_are_removed():
    assert both("OUTPUT_DIR='2024'", key="OUTPUT_DIR") == ("2024", "2024")


def test_the_home_folder_is_filled_in():
    home = os.path.expanduser("~/x")
    assert both("OUTPUT_DIR=~/x", key="OUTPUT_DIR") == (home, home)


@pytest.mark.parametrize("text", ["none", "None", "null", ""])
@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "OUTPUT_DIR"])
def test_none_stands_for_no_file_or_folder(text, key):
    assert both(f"{key}={text}", key=key) == ("", "")


def test_none_may_be_a_word_of_its_own():
    assert yaml("INPUT.RANDOM_FLIP=none").INPUT.RANDOM_FLIP == "none"
    assert yaml("INPUT.SEMANTIC='none'").INPUT.SEMANTIC == "none"
    assert lazy("dataloader.train.semantic=none").dataloader.train.semantic == "none"
    assert lazy("dataloader.train.semantic=None").dataloader.train.semantic is None


def test_none_switches_rates_off():
    assert yaml("SOLVER.WEIGHT_DECAY_NORM=none").SOLVER.WEIGHT_DECAY_NORM is None
    assert lazy("optimizer.weight_decay_norm=null").optimizer.weight_decay_norm is None


@pytest.mark.parametrize("text, value", [("true", True), ("False", False), ("TRUE", True)])
def test_switches_take_true_and_false(text, value):
    assert both(f"SOLVER.AMP.ENABLED={text}", key="SOLVER.AMP.ENABLED") == (value, value)


@pytest.mark.parametrize(
    "text, names",
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("(a,b)", ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ("[a]", ["a"]),
        ("2017", ["2017"]),
        ("[2017,b]", ["2017", "b"]),
        ("[]", []),
        ("", []),
    ],
)
def test_data_sets_may_be_one_or_several(text, names):
    in_yaml = yaml("DATASETS.TRAIN=('old',)", f"DATASETS.TRAIN={text}").DATASETS.TRAIN
    in_lazy = lazy(f"DATASETS.TRAIN={text}").dataloader.train.dataset
    assert (in_yaml, list(in_lazy)) == (tuple(names), names)


def test_a_registration_is_one_entry_in_spite_of_its_comma():
    text = "my=annotations.json,images"
    in_yaml, in_lazy = both(f"DATASETS.REGISTER={text}", key="DATASETS.REGISTER")
    assert (in_yaml, list(in_lazy)) == ((text,), [text])


def test_lists_keep_their_type_and_the_type_of_their_numbers():
    cfg = yaml("INPUT.MIN_SIZE_TRAIN=128", "MODEL.PIXEL_MEAN=(1,2,3)", "SOLVER.STEPS=[]")
    assert cfg.INPUT.MIN_SIZE_TRAIN == (128,)
    assert cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
    assert all(isinstance(v, float) for v in cfg.MODEL.PIXEL_MEAN)
    assert cfg.SOLVER.STEPS == ()
    cfg = yaml("MODEL.ANCHOR_GENERATOR.SIZES=[[8],[16]]")
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8], [16]]
    cfg = lazy("lr_multiplier.milestones=(5,7)", "model.pixel_mean=[1,2,3]", "model.names=p4,p5")
    assert cfg.lr_multiplier.milestones == [5, 7]
    assert cfg.model.pixel_mean == [1.0, 2.0, 3.0]
    assert cfg.model.names == ["p4", "p5"]


def test_lists_are_indexed_with_dots_or_brackets():
    cfg = lazy(
        "dataloader.train.augmentations.0.max_size=96",
        "dataloader.train.augmentations[0].length=64",
        "model.pixel_mean[1]=7",
    )
    assert cfg.dataloader.train.augmentations[0] == {"length": [64], "max_size": 96}
    assert cfg.model.pixel_mean == [103.5, 7.0, 123.7]


def test_groups_and_unset_values_of_lazy_configs_take_dicts():
    cfg = lazy("optimizer.clip_gradients={type: norm, value: 2.0}", "train.ddp={'x': True}")
    assert cfg.optimizer.clip_gradients == {"type": "norm", "value": 2.0}
    assert cfg.train.ddp == {"x": True}


def test_interpolations_are_resolved_replaced_and_set():
    assert lazy("train.max_iter=5").lr_multiplier.max_iter == 5
    cfg = lazy("lr_multiplier.max_iter=7", "train.seed=${train.max_iter}")
    assert (cfg.lr_multiplier.max_iter, cfg.train.max_iter, cfg.train.seed) == (7, 100, 100)
    with pytest.raises(UserError, match="lr_multiplier.max_iter takes a whole number such as 100"):
        lazy("lr_multiplier.max_iter=abc")


def test_a_mandatory_value_can_be_given():
    assert lazy("model.build=[1]").model.build == [1]


def test_plus_adds_new_keys_to_lazy_configs_and_overrules_types():
    cfg = lazy("+train.new.key=[1]", "+optimizer.clip_gradients.type=norm", "+train.seed=abc")
    assert cfg.train.new.key == [1]
    assert cfg.optimizer.clip_gradients == {"type": "norm"}
    assert cfg.train.seed == "abc"


def test_names_of_the_other_kind_work_for_the_common_settings():
    assert yaml("train.max_iter=7").SOLVER.MAX_ITER == 7
    assert lazy("SOLVER.MAX_ITER=7").train.max_iter == 7
    assert LAZY_TO_YAML["train.max_iter"] == "SOLVER.MAX_ITER"


def test_every_yaml_name_with_a_lazy_twin_exists():
    assert set(YAML_TO_LAZY) <= set(yaml_keys(get_cfg()))


@pytest.mark.parametrize(
    "words",
    [
        ["SEED=3", "OUTPUT_DIR=/tmp/a=b"],
        ["SEED", "3", "OUTPUT_DIR", "/tmp/a=b"],
        ["SEED", "3", "OUTPUT_DIR=/tmp/a=b"],
        ["SEED=3", "OUTPUT_DIR", "/tmp/a=b"],
    ],
)
def test_pairs_of_words_mix_with_assignments(words):
    cfg = yaml(*words)
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (3, "/tmp/a=b")
    cfg = lazy(*words)
    assert (cfg.train.seed, cfg.train.output_dir) == (3, "/tmp/a=b")


def test_a_pair_may_hold_a_negative_number_or_nothing():
    cfg = yaml("SEED", "-1", "MODEL.WEIGHTS", "")
    assert (cfg.SEED, cfg.MODEL.WEIGHTS) == (-1, "")


def test_later_overrides_win():
    assert lazy("train.seed=1", "SEED=2").train.seed == 2


YAML_ERRORS = {
    "SEED=abc": "SEED takes a whole number such as 42",
    "SEED=1.5": "SEED takes a whole number",
    "SEED=true": "SEED takes a whole number",
    "SEED=none": "SEED takes a whole number",
    "SEED=": "SEED takes a whole number",
    "SOLVER.BASE_LR=fast": "SOLVER.BASE_LR takes a number such as 0.001",
    "SOLVER.AMP.ENABLED=1": "SOLVER.AMP.ENABLED takes true or false such as False",
    "SOLVER.STEPS=none": "SOLVER.STEPS takes a list such as",
    "MODEL.PIXEL_MEAN=[a,2,3]": "MODEL.PIXEL_MEAN takes a list of numbers such as",
    "MODEL=3": "MODEL is a group of keys, set one of them",
    "MODEL={}": "MODEL is a group of keys, set one of them",
    "SOLVER.MAX_ITR=3": "no such key (nearest: SOLVER.MAX_ITER",
    "solver.max_iter=3": "no such key (nearest: SOLVER.MAX_ITER",
    "max_iter=3": "no such key (nearest: SOLVER.MAX_ITER",
    "SEED.X=3": "no such key",
    "+SOLVER.NEW=3": "yaml configs take no new ones",
    "qqqqqq=3": "no such key",
}
LAZY_ERRORS = {
    # Nothing would read these: no advice to add them.
    "SOLVER.WEIGHT_DECAY=0.1": "SOLVER.WEIGHT_DECAY is a key of yaml configs",
    "+SOLVER.WEIGHT_DECAY=0.1": "and this one is lazy",
    "INPUT.MIN_SIZE_TEST=64": "INPUT.MIN_SIZE_TEST is a key of yaml configs",
    "train.seed=${train.max_iter": "no viable alternative",
    "+train.other=${train.max_iter": "no viable alternative",
    "train.seed=abc": "train.seed takes a whole number such as 42",
    "SEED=abc": "train.seed takes a whole number",
    "optimizer.lr=fast": "optimizer.lr takes a number such as 0.02",
    "train.amp.enabled=1": "train.amp.enabled takes true or false such as False",
    "lr_multiplier.milestones=[a]": "lr_multiplier.milestones takes a list of numbers such as [60,",
    "train=3": "train is a group of keys, set one of them",
    "train.max_itr=3": "no such key (nearest: train.max_iter",
    "TRAIN.MAX_ITR=3": "no such key (nearest: train.max_iter",
    "train.max_itr=4": "+train.max_itr=VALUE adds a new one",
    "length=4": "no such key (nearest: dataloader.train.augmentations.0.length)",
    "train.seed.x=3": "train.seed is a value, not a group of keys",
    "+train.seed.x=3": "train.seed is a value, not a group of keys",
    "model.pixel_mean.5=1": "model.pixel_mean is a list of 3, which has no entry '5'",
    "+model.names.x=1": "model.names is a list of 2, which has no entry 'x'",
    "optimizer.clip_gradients.type=norm": "no such key",
    "~train.seed=3": "no such key (nearest: train.seed",
}
WORD_ERRORS = {
    ("SEED",): "override 'SEED' has no value; write it as SEED=VALUE",
    ("OUTPUT_DIR", "SEED=3"): "override 'OUTPUT_DIR' has no value",
    ("=3",): "override '=3' has no key",
    ("SEED=", "3"): "override 'SEED= 3': write it as SEED=3",
    ("SEED =", "3"): "write it as SEED=3",
}


@pytest.mark.parametrize("override", YAML_ERRORS)
def test_a_mistake_in_a_yaml_override_is_named_in_one_line(override):
    with pytest.raises(UserError) as error:
        yaml(override)
    assert str(error.value).startswith(f"override '{override}': ")
    assert YAML_ERRORS[override] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("override", LAZY_ERRORS)
def test_a_mistake_in_a_lazy_override_is_named_in_one_line(override):
    with pytest.raises(UserError) as error:
        lazy(override)
    assert str(error.value).startswith(f"override '{override}': ")
    assert LAZY_ERRORS[override] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", WORD_ERRORS)
def test_words_that_are_no_override_are_named_in_one_line(words):
    for apply in (yaml, lazy):
        with pytest.raises(UserError) as error:
            apply(*words)
        assert WORD_ERRORS[words] in str(error.value)


def test_a_mistake_leaves_the_setting_as_it_was():
    cfg = copy.deepcopy(LAZY)
    with pytest.raises(UserError):
        apply_to_lazy(cfg, parse_overrides(["train.new_group.seed=3"]))
    assert cfg == LAZY


def test_keys_of_a_lazy_config_are_leaves_with_list_indices():
    keys = lazy_keys(LAZY)
    assert {"dataloader.train.augmentations.1.flip", "lr_multiplier.max_iter"} <= set(keys)
    assert {"model.pixel_mean", "optimizer.clip_gradients", "model.build"} <= set(keys)
    assert not {"train", "model.pixel_mean.0", "dataloader.train.augmentations"} & set(keys)


def test_nearest_names_look_at_spelling_and_at_the_last_part():
    names = ["train.max_iter", "solver.STEPS", "model.backbone.norm"]
    assert nearest("train.maxiter", names) == " (nearest: train.max_iter)"
    assert nearest("lr_multiplier.steps", names) == " (nearest: solver.STEPS)"
    assert nearest("zzz", names) == ""


@pytest.mark.parametrize("words", [["SEED", "=", "3"], ["SEED", "=3"], ["SEED=3"], ["SEED", "3"]])
def test_spaces_around_the_equals_sign_are_understood(words):
    (override,) = parse_overrides(words)
    assert (override.key, override.value) == ("SEED", 3)


def test_a_part_of_a_lazy_model_is_removed_by_null_with_what_refers_to_it():
    path = Path(__file__).resolve().parents[2] / "projects/HTC/configs/htc_tiny.py"
    cfg = load_config(path, ["model.roi_heads.semantic_head=null"])
    assert cfg.model.roi_heads.semantic_head is None
    assert cfg.dataloader.train.mapper.num_semantic_labels is None
    assert instantiate(cfg.model).roi_heads.semantic_head is None
