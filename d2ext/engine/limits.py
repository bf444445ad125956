"""Settings with a limited range, checked before anything is built."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from d2ext.config.overrides import YAML_TO_LAZY
from d2ext.engine.experiment import Experiment
from d2ext.errors import UserError

# numpy's generators take no larger one; every process adds its number.
MAX_SEED = 2**32 - 2**16


class Limit(NamedTuple):
    """The range of a number, or of every number in a list."""

    yaml: str
    lazy: str
    low: float
    high: float = math.inf
    # What to do, after "at least 1".
    mend: str = ""
    whole: bool = True


def _twin(key: str, low: float, high: float = math.inf, mend: str = "") -> Limit:
    return Limit(key, YAML_TO_LAZY[key], low, high, mend)


_FIRST = "dataloader.train.mapper.augmentations.0."
_LIMITS = (
    _twin("SOLVER.MAX_ITER", 1),
    _twin("SOLVER.IMS_PER_BATCH", 1),
    _twin("SOLVER.CHECKPOINT_PERIOD", 1, mend="a number above MAX_ITER for the last one only"),
    _twin("SOLVER.CHECKPOINT_KEEP", 0, mend="0 keeps all"),
    _twin("SOLVER.ACCUMULATION_STEPS", 1, mend="1 takes the batch in one piece"),
    _twin("SOLVER.EMA_DECAY", 0, 1 - 1e-9, mend="0 keeps no average")._replace(whole=False),
    _twin("LOG_PERIOD", 1),
    _twin("TEST.EVAL_PERIOD", 0, mend="0 evaluates after the training only"),
    _twin("TEST.EARLY_STOPPING", 0, mend="0 never ends the training early"),
    _twin("DATALOADER.NUM_WORKERS", 0, mend="0 loads in the main process"),
    _twin("SEED", -math.inf, MAX_SEED, mend="a negative one is another in each run"),
    Limit("SOLVER.BASE_LR", "optimizer.lr", 0, whole=False),
    Limit("SOLVER.WEIGHT_DECAY", "optimizer.weight_decay", 0, whole=False),
    Limit("SOLVER.WEIGHT_DECAY_NORM", "optimizer.weight_decay_norm", 0, whole=False),
    Limit("SOLVER.WEIGHT_DECAY_BIAS", "optimizer.weight_decay_bias", 0, whole=False),
    Limit("SOLVER.MOMENTUM", "optimizer.momentum", 0, 1, whole=False),
    Limit("SOLVER.GAMMA", "lr_multiplier.gamma", 0, whole=False),
    Limit("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_iters", 0),
    Limit("SOLVER.WARMUP_FACTOR", "lr_multiplier.warmup_factor", 0, whole=False),
    Limit("MODEL.BACKBONE.FREEZE_AT", "", 0, 5, "that many of the stem and the four stages"),
    Limit("MODEL.ROI_HEADS.NUM_CLASSES", "model.roi_heads.num_classes", 1),
    Limit("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "model.roi_heads.batch_size_per_image", 1),
    Limit("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "model.roi_heads.box_pooler.output_size", 1),
    Limit("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "model.roi_heads.mask_pooler.output_size", 1),
    Limit("INPUT.MIN_SIZE_TRAIN", f"{_FIRST}short_edge_length", 1),
    Limit("INPUT.MAX_SIZE_TRAIN", f"{_FIRST}max_size", 1),
    Limit("MODEL.ANCHOR_GENERATOR.SIZES", "model.proposal_generator.anchor_generator.sizes", 1e-9)
    ._replace(whole=False),
    Limit(
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
        "model.proposal_generator.anchor_generator.aspect_ratios",
        1e-9,
        whole=False,
    ),
)  # fmt: skip

_CHOICES = (
    ("SOLVER.AMP.DTYPE", "train.amp.dtype", ("float16", "bfloat16")),
    ("INPUT.FORMAT", "dataloader.train.mapper.image_format", ("BGR", "RGB")),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", f"{_FIRST}sample_style", ("choice", "range")),
    ("INPUT.RANDOM_FLIP", "", ("horizontal", "vertical", "none")),
    ("INPUT.CROP.TYPE", "", ("relative", "relative_range", "absolute", "absolute_range")),
)

# Where lazy configs have the number of detections; cascades have it in the last stage.
_DETECTIONS = (
    "model.roi_heads.box_predictor.test_topk_per_image",
    "model.roi_heads.box_predictors.2.test_topk_per_image",
    "model.roi_heads.max_per_image",
)

_BOX = "one each for x, y, width and height"
_LENGTHS = (
    ("MODEL.PIXEL_MEAN", "model.pixel_mean", (3,), "one per channel"),
    ("MODEL.PIXEL_STD", "model.pixel_std", (3,), "one per channel"),
    # 5 are those of rotated boxes.
    ("MODEL.RPN.BBOX_REG_WEIGHTS", "", (4, 5), _BOX),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "", (4, 5), _BOX),
)


def check_limits(experiment: Experiment) -> None:
    """Refuse numbers that are out of range or of the wrong kind.

    Raises:
        UserError: names the key and the value.
    """
    for limit in _LIMITS:
        value = experiment.setting(limit.yaml, limit.lazy)
        if value is not None:
            _check(limit, value, experiment.name_of(limit.yaml, limit.lazy))
    for yaml, lazy, choices in _CHOICES:
        value, name = experiment.setting(yaml, lazy), experiment.name_of(yaml, lazy)
        if value is not None and value not in choices:
            raise UserError(f"{name} is {value!r}; it has to be one of {', '.join(choices)}")
    for lazy in _DETECTIONS:
        if experiment.setting("TEST.DETECTIONS_PER_IMAGE", lazy) == 0:
            name = experiment.name_of("TEST.DETECTIONS_PER_IMAGE", lazy)
            raise UserError(f"{name} is 0; it has to be at least 1, or -1 for all detections")
    _check_lengths(experiment)


def _check_lengths(experiment: Experiment) -> None:
    for yaml, lazy, lengths, why in _LENGTHS:
        value, name = experiment.setting(yaml, lazy), experiment.name_of(yaml, lazy)
        if isinstance(value, list) and len(value) not in lengths:
            raise UserError(f"{name} is {value}: it needs {lengths[0]} numbers, {why}")
        if yaml.endswith("STD") and isinstance(value, list) and not all(value):
            raise UserError(f"{name} is {value}: pixels are divided by it, it has to be above 0")


def _check(limit: Limit, value: Any, name: str) -> None:
    numbers = list(_leaves(value))
    if isinstance(value, list) and not numbers:
        raise UserError(f"{name} is empty; it needs at least one number")
    for number in numbers:
        wanted = "a whole number" if limit.whole else "a number"
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or (limit.whole and number != int(number)):
            raise UserError(f"{name} is {value!r}; it has to be {wanted}")
        if not limit.low <= number <= limit.high:
            least = "above 0" if 0 < limit.low < 1 else f"at least {limit.low}"
            parts = [least if number < limit.low or number != number else f"at most {limit.high}"]
            parts += [limit.mend] if limit.mend else []
            raise UserError(f"{name} is {value}; it has to be {'; '.join(parts)}")


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def check_device(experiment: Experiment) -> None:
    """Raise a `UserError` if the device is unknown or not on this machine."""
    mend = "set MODEL.DEVICE=cpu (yaml) or train.device=cpu (lazy)"
    try:
        device = torch.device(experiment.device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device '{experiment.device}' is unknown; {mend}, or cuda") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device is '{experiment.device}', but this machine has no usable GPU; {mend}"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"device is '{experiment.device}', but this machine has {count} GPU(s), cuda:0 to "
            f"cuda:{count - 1}; {mend}, or one of these"
        )
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise UserError(f"device '{experiment.device}' cannot be used here; {mend}") from error
