"""What a checkpoint was trained with, and what is different now.

A training stores its class names and its config beside the weights. Whoever uses them compares: a
difference that gives the weights another meaning is an error, unless the command line names the
key; others that change what comes out are told, one line each.
"""

import copy
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from d2ext.checkpoint.settings import SETTINGS_KEY, settings_to_config
from d2ext.config.stored import flat_settings
from d2ext.data import parse_register
from d2ext.engine.experiment import Experiment
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

CONFIG_KEY = "config"
_MOST_LINES = 30
# Settings of the model and its input that weights are bound to: leaves of keys of either kind.
_BINDING = re.compile(
    r"(?i)(.+\.)?(pixel_mean|pixel_std|format|input_format|image_format|sizes|aspect_ratios|offset"
    r"|strides?|(bbox_reg_)?weights|stride_in_1x1|name|head_name|meta_architecture|_target_"
    r"|pooler_type|cls_agnostic_(bbox_reg|mask))"
)
# Nothing of these changes a prediction, or it is compared elsewhere.
_IGNORED = re.compile(
    r"(?i)MODEL\.(WEIGHTS|DEVICE)|(.+\.)?num_classes|.+_train|(.+\.)?(is_train|semantic|freeze_at|ious"
    r"|iou_(thresholds?|labels)|(batch_size_per_image|positive_fraction)(_\w+)?|proposal_append_gt"
    r"|boundary_thresh|train_on_pred_boxes|(bbox_reg_)?loss_\w+|\w*loss_(type|weight)s?"
    r"|smooth_l1_beta|ignore_value)|.+\.\w*(matcher|sampler)s?(\.\d+)?\..+"
)
_COMPARED = re.compile(
    r"MODEL\..+|INPUT\.(FORMAT|MIN_SIZE_TEST|MAX_SIZE_TEST)|TEST\.DETECTIONS_PER_IMAGE"
    r"|model\..+|dataloader\.test\.mapper\.(augmentations\..+|image_format)"
)
# The same in yaml and in lazy configs, where the model has them.
_TWINS = {
    "INPUT.FORMAT": "model.input_format",
    "INPUT.MIN_SIZE_TEST": "dataloader.test.mapper.augmentations.0.short_edge_length",
    "INPUT.MAX_SIZE_TEST": "dataloader.test.mapper.augmentations.0.max_size",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "MODEL.ANCHOR_GENERATOR.SIZES": "model.proposal_generator.anchor_generator.sizes",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "model.proposal_generator.anchor_generator"
    ".aspect_ratios",
    "MODEL.ANCHOR_GENERATOR.OFFSET": "model.proposal_generator.anchor_generator.offset",
    "MODEL.RPN.BBOX_REG_WEIGHTS": "model.proposal_generator.box2box_transform.weights",
    "MODEL.RPN.NMS_THRESH": "model.proposal_generator.nms_thresh",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "model.roi_heads.box_predictor.test_score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "model.roi_heads.box_predictor.test_nms_thresh",
    "TEST.DETECTIONS_PER_IMAGE": "model.roi_heads.box_predictor.test_topk_per_image",
}

logger = logging.getLogger(__name__)


def portable_copy(experiment: Experiment) -> Experiment:
    """The run with absolute paths of files and folders in its config, which is a copy: it can be
    used in any folder. Names of built-in data sets stay relative to $DETECTRON2_DATASETS."""
    kind: Any = type(experiment)  # one of those that are made of a config
    made = kind(copy.deepcopy(experiment.cfg))
    weights = made.init_checkpoint
    if weights and "://" not in weights:
        weights = os.path.abspath(weights)
    made.set_paths(os.path.abspath(made.output_dir), weights)
    made.set_registered([absolute_register(text) for text in made.registered()])
    return made


def absolute_register(text: str) -> str:
    """A `--register` argument with absolute paths; addresses stay."""
    name, *paths = filter(None, parse_register(text))
    whole = [path if "://" in path else os.path.abspath(path) for path in paths]
    return f"{name}={','.join(whole)}"


def config_to_store(experiment: Experiment) -> str:
    """The config of a run as it is stored in checkpoints: the text of its `config.yaml`. Empty for
    a lazy config with objects that no text can stand for."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        portable_copy(experiment).write_config(path)
        if not os.path.isfile(path):
            return ""
        with open(path, encoding="utf-8") as f:
            return f.read()


def class_names(stored: dict[str, Any]) -> list[str]:
    """The class names in the metadata of a checkpoint; none if they are no texts."""
    names: Any = stored.get("thing_classes")
    valid = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if valid else []


def classes_of_data(experiment: Experiment) -> list[str]:
    """Class names of the first data set of a run that is known, training sets first."""
    known = set(DatasetCatalog.list())
    for name in experiment.train_sets() + experiment.test_sets():
        names = getattr(MetadataCatalog.get(name), "thing_classes", ()) if name in known else ()
        if names:
            return list(names)
    return []


def class_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """What is different between the class names of weights and of data, in words; "" if nothing."""
    theirs, ours = list(theirs), list(ours)
    if theirs == ours:
        return ""
    if len(theirs) != len(ours):
        return f"{len(theirs)} classes ({_some(theirs)}), not {len(ours)} ({_some(ours)})"
    index = next(i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
    order = " in another order" if sorted(theirs) == sorted(ours) else ""
    return f"classes{order}: number {index} is '{theirs[index]}' there and '{ours[index]}' here"


def check_classes(experiment: Experiment, stored: dict[str, Any], path: str) -> None:
    """Refuse data whose classes are not those of the weights, for evaluation and resuming.

    The order is not changed to fit: numbers of classes are in results, too, and in the weights that
    a resumed training saves.

    Args:
        stored: metadata of the checkpoint.
        path: of the checkpoint.

    Raises:
        UserError: they differ; names alone may, where the user says that they are the same classes.
    """
    theirs, ours = class_names(stored), classes_of_data(experiment)
    difference = class_difference(theirs, ours) if theirs and ours else ""
    if not difference:
        return
    line = f"checkpoint '{path}' was trained on {difference}"
    if len(theirs) != len(ours):
        raise UserError(f"{line}; take the data set, or the weights, that belong together")
    if sorted(theirs) == sorted(ours):
        raise UserError(f"{line}; number the categories (ids in the json) as for the training")
    if not experiment.rename_classes:
        raise UserError(f"{line}; if these are the same classes, --rename-classes says so")
    logger.warning("%s", line)


def note_classes(experiment: Experiment, stored: dict[str, Any], path: str) -> None:
    """Tell that a training starts from weights of other classes, which is no mistake."""
    theirs, ours = class_names(stored), classes_of_data(experiment)
    difference = class_difference(theirs, ours) if theirs and ours else ""
    if difference:
        logger.warning(
            "checkpoint '%s' was trained on %s; what it knows of classes is where the training "
            "starts if the shapes are equal",
            path,
            difference,
        )


def note_settings(experiment: Experiment, stored: dict[str, Any], path: str) -> None:
    """Tell what weights that a training starts from are bound to and do not get; it may learn."""
    for key, theirs, ours in setting_differences(experiment, stored, path):
        if _BINDING.fullmatch(key):
            logger.warning("not as in the training of '%s': %s", path, _line(key, theirs, ours))


def check_stored_settings(experiment: Experiment, stored: dict[str, Any], path: str) -> None:
    """Compare the config with the one that a checkpoint was trained with, and tell what changes a
    prediction; nothing, if the file holds none.

    Args:
        stored: metadata of the checkpoint.
        path: of the checkpoint.

    Raises:
        UserError: a setting that the weights are bound to is another one, and the command line does
            not name it.
    """
    found = setting_differences(experiment, stored, path)
    refused = [x for x in found if _BINDING.fullmatch(x[0]) and not _is_chosen(x[0], experiment)]
    if refused:
        raise UserError(
            f"checkpoint '{path}' was trained with other settings: "
            + "; ".join(_line(*x) for x in refused[:3])
            + (f"; {len(refused) - 3} more" if len(refused) > 3 else "")
            + "; take the config of the training, or set these keys on the command line"
        )
    for key, theirs, ours in found[:_MOST_LINES]:
        logger.warning("not as in the training of '%s': %s", path, _line(key, theirs, ours))
    if len(found) > _MOST_LINES:
        logger.warning("%d more settings differ", len(found) - _MOST_LINES)


def setting_differences(
    experiment: Experiment, stored: dict[str, Any], path: str
) -> list[tuple[str, Any, Any]]:
    """(key, value in the training, value now) of the settings that change a prediction.

    A yaml and a lazy config are compared in the few settings whose names in both are known.
    """
    text = stored.get(CONFIG_KEY)
    if not isinstance(text, str) or not text:
        return []
    now = portable_copy(experiment)
    settings = stored.get(SETTINGS_KEY)
    settings_to_config(now.cfg, settings if isinstance(settings, dict) else {})  # what loading sets
    try:
        theirs, ours = flat_settings(text, path), flat_settings(config_to_store(now), "this run")
    except UserError as error:
        logger.warning("%s; settings are not compared with those of '%s'", error, path)
        return []
    if ("MODEL.META_ARCHITECTURE" in theirs) != ("MODEL.META_ARCHITECTURE" in ours):
        theirs, ours = _as_yaml(theirs), _as_yaml(ours)
        keys = [key for key in ours if key in theirs]
        theirs, ours = ({k: _flat(x[k]) for k in keys} for x in (theirs, ours))
    return [
        (key, theirs.get(key), ours.get(key))
        for key in dict.fromkeys([*theirs, *ours])
        if _COMPARED.fullmatch(key)
        and not _IGNORED.fullmatch(key)
        and not _same(theirs.get(key), ours.get(key))
    ]


def _as_yaml(settings: dict[str, Any]) -> dict[str, Any]:
    names = {lazy: yaml for yaml, lazy in _TWINS.items()}
    known = {names.get(key, key): value for key, value in settings.items()}
    return {key: value for key, value in known.items() if key in _TWINS}


def _flat(value: Any) -> Any:
    """The entries of nested lists in one list; a single one by itself."""
    if not isinstance(value, list):
        return value
    flat = []
    for entry in map(_flat, value):
        flat += entry if isinstance(entry, list) else [entry]
    return flat[0] if len(flat) == 1 else flat


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, float) or isinstance(b, float):
        try:
            return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
        except TypeError:
            return False
    return a == b


def _is_chosen(key: str, experiment: Experiment) -> bool:
    names = {key, _TWINS.get(key, key)}
    return any(n == c or n.startswith(f"{c}.") for n in names for c in experiment.chosen)


def _line(key: str, theirs: Any, ours: Any) -> str:
    return f"{key} was {_short(theirs)} and is {_short(ours)}"


def _short(value: Any) -> str:
    text = "not set" if value is None else " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown
