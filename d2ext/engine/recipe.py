"""Recipes: configs whose numbers are fitted to the data when a training starts.

The rules are in `d2ext.engine.recipe_rules`. What they choose is put into the ordinary keys of the
config, told line by line, and stored with the config, which is then no recipe any more: whoever
resumes, evaluates or predicts uses the very same numbers.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2ext.config.overrides import YAML_TO_LAZY
from d2ext.config.stored import flat_settings
from d2ext.data import parse_register
from d2ext.engine.experiment import Experiment
from d2ext.engine.provenance import CONFIG_KEY
from d2ext.engine.recipe_rules import (
    LONG_SIDE,
    Choice,
    DataStatistics,
    choose_anchors,
    choose_batch,
    choose_evaluation,
    choose_length,
    choose_rate,
    choose_size,
    choose_warmup,
)
from d2ext.errors import UserError
from d2ext.evaluation import evaluator_kind

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm

# Options of the command line, and the keys to set in a config that is no recipe.
OPTIONS = {
    "epochs": "SOLVER.MAX_ITER",
    "image_size": "INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST",
    "batch_size": "SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR",
}
_RESIZE = "dataloader.{}.mapper.augmentations.0.{}"
_ANCHORS = "model.proposal_generator.anchor_generator"
_TO_LAZY = {
    **YAML_TO_LAZY,
    "SOLVER.WARMUP_ITERS": "lr_multiplier.warmup_iters",
    "INPUT.MIN_SIZE_TRAIN": _RESIZE.format("train", "short_edge_length"),
    "INPUT.MAX_SIZE_TRAIN": _RESIZE.format("train", "max_size"),
    "INPUT.MIN_SIZE_TEST": _RESIZE.format("test", "short_edge_length"),
    "INPUT.MAX_SIZE_TEST": _RESIZE.format("test", "max_size"),
    "MODEL.ANCHOR_GENERATOR.SIZES": f"{_ANCHORS}.sizes",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": f"{_ANCHORS}.aspect_ratios",
}

logger = logging.getLogger(__name__)


def is_recipe(experiment: Experiment) -> bool:
    """Whether the rules are still to be applied."""
    return bool(_of(experiment, "ENABLED"))


def take_data(experiment: Experiment, register: Sequence[str], eval_only: bool = False) -> None:
    """Let a recipe train on the first `--register` and be tested on the second, or on none, where
    the command line names no data sets; with `eval_only`, be tested on the last."""
    names = [parse_register(text).name for text in register]
    if not names or not is_recipe(experiment):
        return
    if len(names) > 2 and not {"DATASETS.TRAIN", "DATASETS.TEST"} <= experiment.chosen:
        raise UserError(
            f"--register is given {len(names)} times; DATASETS.TRAIN=NAME and DATASETS.TEST=NAME "
            "say which is for what"
        )
    train, test = names[:1], names[-1:] if eval_only else names[1:2]
    for key, value in (("DATASETS.TRAIN", train), ("DATASETS.TEST", test)):
        if key not in experiment.chosen:
            experiment.change([f"{key}=[{','.join(value)}]"])


def take_options(experiment: Experiment, options: dict[str, Any]) -> None:
    """Remember what the command line asks of a recipe: `epochs`, `image_size`, `batch_size`, each
    `None` if it is not given.

    Raises:
        UserError: the config is no recipe, or a number is not positive.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if not is_recipe(experiment):
            applied = _of(experiment, "APPLIED")
            what = (
                ": a config that a recipe has left has its numbers"
                if applied
                else " is for recipes"
            )
            keys = " and ".join(_name(experiment, k) for k in OPTIONS[name].split(" and "))
            raise UserError(f"{option}{what}; set {keys}, or take a config *_finetune")
        if not value > 0:
            raise UserError(f"{option} is {value}; it has to be above 0")
    experiment.recipe_options = given
    if "epochs" in given:
        _set(experiment, "RECIPE.EPOCHS", float(given["epochs"]))
    if "image_size" in given:
        _set(experiment, "RECIPE.IMAGE_SIZE", given["image_size"])
    if "batch_size" in given:
        _set(experiment, "RECIPE.BATCH", given["batch_size"])


def fit_recipe(experiment: Experiment) -> list[Choice]:
    """Apply the rules to a run that starts. What the command line sets stays, and the rules that
    follow from it use it.

    Returns:
        what was set; nothing if the config is no recipe.

    Raises:
        UserError: the training set has no objects.
    """
    if not is_recipe(experiment):
        return []
    data = read_statistics(experiment.train_sets())
    chosen: list[Choice] = []

    def use(choice: Choice) -> Any:
        """The value that holds: the rule's, or the user's."""
        lazy = _TO_LAZY[choice.key]
        if {choice.key, lazy} & experiment.chosen:
            return experiment.setting(choice.key, lazy)
        if experiment.setting(choice.key, lazy) is not None:
            _set(experiment, choice.key, choice.value)
            chosen.append(choice)
        return choice.value

    given = experiment.recipe_options
    low, high = _of(experiment, "SHORT_SIDE")
    scales = _of(experiment, "TRAIN_SCALES")
    sizes = choose_size(
        data, _of(experiment, "OBJECT_SIZE"), low, high, scales, _of(experiment, "IMAGE_SIZE")
    )
    side = [use(choice) for choice in sizes][0]
    anchors = experiment.setting("MODEL.ANCHOR_GENERATOR.SIZES", f"{_ANCHORS}.sizes")
    if anchors:
        ratios = data.boxes[:, 0] / data.boxes[:, 1]
        mode = _of(experiment, "ANCHORS")
        for choice in choose_anchors(data.object_sizes(side), ratios, anchors, mode):
            use(choice)
    batch = choose_batch(
        _of(experiment, "BATCH"),
        data.num_images,
        _megapixels(data, side * max(scales)),
        _of(experiment, "MEMORY"),
        _gpu_memory(experiment.device),
        comm.get_world_size(),
    )
    if "batch_size" in given:
        batch = Choice(batch.key, given["batch_size"], "--batch-size", "you")
    count = use(batch)
    rate, reference = _of(experiment, "RATE")
    use(choose_rate(rate, reference, count))
    low, high = _of(experiment, "ITERATIONS")
    length = use(
        choose_length(
            _of(experiment, "EPOCHS"),
            data.num_images,
            count,
            low,
            high,
            given="epochs" in given,
        )
    )
    use(choose_warmup(length))
    tests = experiment.test_sets()
    for choice in choose_evaluation(
        length,
        count,
        _of(experiment, "EVALUATIONS"),
        _of(experiment, "PATIENCE"),
        sum(len(DatasetCatalog.get(name)) for name in tests),
        _metric(tests),
    ):
        use(choice)
    _finish(experiment, [_override(choice.key, choice.value) for choice in chosen])
    for choice in chosen:
        logger.info("recipe: %s", choice._replace(key=_name(experiment, choice.key)))
    if not tests:
        logger.warning("recipe: no test set, so nothing says how good the result is")
    return chosen


def recall_recipe(experiment: Experiment, stored: dict[str, Any], path: str) -> None:
    """Set what the rules chose when weights were trained, for whoever resumes, evaluates or
    predicts with a recipe. Weights of no recipe leave the numbers of the config as they are.

    Args:
        stored: metadata of the checkpoint.
        path: of the checkpoint.

    Raises:
        UserError: the command line asks for another number than the run was started with.
    """
    if not is_recipe(experiment):
        return
    text = stored.get(CONFIG_KEY)
    settings = flat_settings(text, path) if isinstance(text, str) and text else {}
    for name, value in experiment.recipe_options.items():
        key = {"epochs": "EPOCHS", "image_size": "IMAGE_SIZE", "batch_size": "BATCH"}[name]
        theirs = settings.get(f"RECIPE.{key}", settings.get(f"recipe.{key.lower()}"))
        if theirs != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {value:g}, but '{path}' was trained with {theirs}; "
                f"a run keeps its numbers, set {_name(experiment, OPTIONS[name].split(' and ')[0])}"
            )
    applied = settings.get("RECIPE.APPLIED", settings.get("recipe.applied")) or []
    taken = []
    for text in map(str, applied):
        key, _, raw = text.partition("=")
        if key in _TO_LAZY and not {key, _TO_LAZY[key]} & experiment.chosen:
            _set(experiment, key, raw)
            taken.append(text)
    _finish(experiment, taken)
    what = f"{len(taken)} numbers of the training of" if taken else "no numbers in"
    logger.info("recipe: %s '%s'", what, path or "no weights")


def read_statistics(names: Sequence[str]) -> DataStatistics:
    """Sizes of the images and objects of registered training sets.

    Raises:
        UserError: there are no objects.
    """
    records = [record for name in names for record in DatasetCatalog.get(name)]
    records = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    images = np.array([(r["height"], r["width"]) for r in records], dtype=float)
    boxes, owners = [], []
    for index, record in enumerate(records):
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = _corners(annotation)
            if not annotation.get("iscrowd", 0) and x1 > x0 and y1 > y0:
                boxes.append((y1 - y0, x1 - x0))
                owners.append(index)
    if not boxes:
        raise UserError(f"data set {', '.join(names)} has no object with a box")
    return DataStatistics(len(records), images, np.array(boxes, dtype=float), np.array(owners))


def _corners(annotation: dict[str, Any]) -> Sequence[float]:
    return BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)


def _megapixels(data: DataStatistics, side: float) -> float:
    """Of the largest training image, padded as batches are."""
    ratio = float((data.images.max(1) / data.images.min(1)).max())
    return side * side * min(ratio, LONG_SIDE) / 1e6


def _gpu_memory(device: str) -> float:
    """GiB that are free on the smallest GPU of all processes; 0 on a CPU."""
    free = 0.0
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(torch.device(device))[0] / 2**30
    return min(comm.all_gather(free))


def _metric(tests: Sequence[str]) -> str:
    if not tests or evaluator_kind(tests[0]) != "coco":
        return ""
    return "segm/AP" if len(tests) == 1 else f"{tests[0]}/segm/AP"


def _of(experiment: Experiment, name: str) -> Any:
    """A value of the recipe, in either kind of config."""
    return experiment.setting(f"RECIPE.{name}", f"recipe.{name.lower()}")


def _name(experiment: Experiment, key: str) -> str:
    return experiment.name_of(key, _TO_LAZY.get(key, key))


def _override(key: str, value: Any) -> str:
    return f"{key}={str(value).replace(' ', '')}"


def _set(experiment: Experiment, key: str, value: Any) -> None:
    lazy = _TO_LAZY.get(key, key.lower().replace("recipe.", "recipe.", 1))
    old = experiment.setting(key, lazy)
    if key.endswith("ASPECT_RATIOS") and isinstance(old, list) and not isinstance(old[0], list):
        value = str(value).replace("[[", "[").replace("]]", "]")  # one list for all levels
    experiment.change([_override(experiment.name_of(key, lazy), value)])


def _finish(experiment: Experiment, applied: Sequence[str]) -> None:
    """From now on an ordinary config, which says what was set."""
    quoted = "[" + ",".join(f"'{text}'" for text in applied) + "]"
    experiment.change([f"{experiment.name_of('RECIPE.APPLIED', 'recipe.applied')}={quoted}"])
    experiment.change([f"{experiment.name_of('RECIPE.ENABLED', 'recipe.enabled')}=False"])
