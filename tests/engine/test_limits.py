"""Numbers out of range, wrong lengths and devices that are not there are named by their key."""

import pytest
import torch

from d2ext.engine import build_experiment
from d2ext.engine.limits import check_device, check_limits
from d2ext.errors import UserError

from tests.engine.helpers import CONFIGS

# What is wrong: overrides of the yaml and of the lazy config, and the words of the message.
_SHORT_EDGE = "dataloader.train.mapper.augmentations.0.short_edge_length"
_ANCHORS = "model.proposal_generator.anchor_generator"
CASES = {
    "checkpoint period": (
        ("SOLVER.CHECKPOINT_PERIOD=0", "train.checkpointer.period=0"),
        "is 0; it has to be at least 1",
    ),
    "checkpoints kept": (
        ("SOLVER.CHECKPOINT_KEEP=-1", "train.checkpointer.max_to_keep=-1"),
        "is -1; it has to be at least 0; 0 keeps all",
    ),
    "log period": (("LOG_PERIOD=0", "train.log_period=0"), "is 0; it has to be at least 1"),
    "workers": (
        ("DATALOADER.NUM_WORKERS=-1", "dataloader.train.num_workers=-1"),
        "is -1; it has to be at least 0",
    ),
    "seed": (
        ("SEED=99999999999", "train.seed=99999999999"),
        "is 99999999999; it has to be at most",
    ),
    "batch": (
        ("SOLVER.IMS_PER_BATCH=0", "dataloader.train.total_batch_size=0"),
        "is 0; it has to be at least 1",
    ),
    "iterations": (("SOLVER.MAX_ITER=-1", "train.max_iter=-1"), "is -1; it has to be at least 1"),
    "evaluation period": (
        ("TEST.EVAL_PERIOD=-1", "train.eval_period=-1"),
        "is -1; it has to be at least 0",
    ),
    "patience": (("TEST.EARLY_STOPPING=-1", "train.early_stopping=-1"), "is -1; it has to be"),
    "detections": (
        (
            "TEST.DETECTIONS_PER_IMAGE=0",
            "model.roi_heads.box_predictor.test_topk_per_image=0",
        ),
        "is 0; it has to be at least 1",
    ),
    "rate": (("SOLVER.BASE_LR=-1", "optimizer.lr=-1"), "is -1.0; it has to be at least 0"),
    "decay": (("SOLVER.WEIGHT_DECAY=-1", "optimizer.weight_decay=-1"), "is -1.0; it has to be"),
    "decay of norms": (
        ("SOLVER.WEIGHT_DECAY_NORM=-1", "optimizer.weight_decay_norm=-1"),
        "is -1.0; it has to be at least 0",
    ),
    "decay of biases": (
        ("SOLVER.WEIGHT_DECAY_BIAS=-1", "+optimizer.weight_decay_bias=-1"),
        "it has to be at least 0",
    ),
    "momentum": (("SOLVER.MOMENTUM=2", "+optimizer.momentum=2"), "it has to be at most 1"),
    "warm-up": (
        ("SOLVER.WARMUP_ITERS=-1", "lr_multiplier.warmup_iters=-1"),
        "is -1; it has to be at least 0",
    ),
    "no size": (("INPUT.MIN_SIZE_TRAIN=()", f"{_SHORT_EDGE}=[]"), "is empty"),
    "negative size": (
        ("INPUT.MIN_SIZE_TRAIN=(-5,)", f"{_SHORT_EDGE}=[-5]"),
        "is [-5]; it has to be at least 1",
    ),
    "two means": (("MODEL.PIXEL_MEAN=[1,2]", "model.pixel_mean=[1,2]"), "needs 3 numbers"),
    "five deviations": (
        ("MODEL.PIXEL_STD=[1,2,3,4,5]", "model.pixel_std=[1,2,3,4,5]"),
        "needs 3 numbers, one per channel",
    ),
    "deviation of 0": (("MODEL.PIXEL_STD=[1,0,1]", "model.pixel_std=[1,0,1]"), "above 0"),
    "no anchors": (("MODEL.ANCHOR_GENERATOR.SIZES=[]", f"{_ANCHORS}.sizes=[]"), "is empty"),
    "negative anchors": (
        ("MODEL.ANCHOR_GENERATOR.SIZES=[[-8]]", f"{_ANCHORS}.sizes=[[-8]]"),
        "is [[-8]]; it has to be above 0",
    ),
    "image format": (
        ("INPUT.FORMAT=XYZ", "dataloader.train.mapper.image_format=XYZ"),
        "is 'XYZ'; it has to be one of BGR, RGB",
    ),
}


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("case", CASES)
def test_a_value_out_of_range_is_named_with_its_key(kind, case):
    overrides, words = CASES[case]
    override = overrides[kind == "py"]
    with pytest.raises(UserError) as error:
        build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", [override], with_data=False)
    text = str(error.value)
    assert text.startswith(override.lstrip("+").split("=")[0]) and words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "override, words",
    [
        ("INPUT.RANDOM_FLIP=foo", "INPUT.RANDOM_FLIP is 'foo'; it has to be one of horizontal"),
        ("INPUT.CROP.TYPE=foo", "INPUT.CROP.TYPE is 'foo'"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING=foo", "one of choice, range"),
        ("MODEL.BACKBONE.FREEZE_AT=9", "at most 5"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS=(1,1)", "needs 4 numbers, one each for x"),
    ],
)
def test_a_value_that_yaml_configs_alone_have_is_named_with_the_valid_ones(override, words):
    with pytest.raises(UserError, match=words):
        build_experiment(f"{CONFIGS['mask_rcnn']}.yaml", [override], with_data=False)


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_value_of_the_wrong_kind_in_a_loaded_config_is_named(kind):
    experiment = build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", with_data=False)
    if kind == "yaml":
        experiment.cfg.SOLVER.IMS_PER_BATCH = "two"
    else:
        experiment.cfg.dataloader.train.total_batch_size = "two"
    with pytest.raises(UserError, match="is 'two'; it has to be a whole number"):
        check_limits(experiment)


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize(
    "device, gpus, words",
    [
        ("gpu", 0, "device 'gpu' is unknown; set MODEL.DEVICE=cpu"),
        ("", 0, "device '' is unknown"),
        ("cuda", 0, "no usable GPU"),
        ("cuda:9", 0, "no usable GPU"),
        ("cuda:9", 2, "this machine has 2 GPU.s., cuda:0 to cuda:1"),
        ("cuda:x", 2, "device 'cuda:x' is unknown"),
        ("meta", 0, "device 'meta' cannot be used here"),
    ],
)
def test_a_device_that_is_not_there_is_named(monkeypatch, kind, device, gpus, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    experiment = build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", with_data=False)
    experiment.set_device(device)
    with pytest.raises(UserError, match=words):
        check_device(experiment)
    experiment.set_device("cpu")
    check_device(experiment)
