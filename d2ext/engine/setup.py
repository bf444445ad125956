"""From a command line to a checked `Experiment`: data sets, number of classes, device."""

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn import Module

from d2ext.config import is_lazy, load_config
from d2ext.config.overrides import LAZY_TO_YAML, YAML_TO_LAZY, nearest, parse_overrides
from d2ext.data import (
    check_before_training,
    dataset_classes,
    parse_register,
    register_all,
    register_coco_dataset,
    semantic_num_labels,
)
from d2ext.engine.console import LOGGERS, begin_brief
from d2ext.engine.experiment import Experiment
from d2ext.engine.lazy_experiment import LazyExperiment
from d2ext.engine.limits import check_limits
from d2ext.engine.provenance import absolute_register, portable_copy
from d2ext.engine.recipe import take_data
from d2ext.engine.summary import log_start
from d2ext.engine.yacs_experiment import YacsExperiment
from d2ext.errors import UserError
from d2ext.evaluation import evaluator_kind
from d2ext.modeling.backbone.norm import EvalStatsBatchNorm2d

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

logger = logging.getLogger(__name__)

_CLASS_KEYS = ("MODEL.ROI_HEADS.NUM_CLASSES", "model.roi_heads.num_classes")


def build_experiment(
    config: str | os.PathLike | CfgNode | DictConfig,
    overrides: Sequence[str] = (),
    register: Sequence[str] = (),
    with_data: bool = True,
    eval_only: bool = False,
) -> Experiment:
    """Load a config, register its data sets and fit the number of classes to them.

    Args:
        config: path of a yaml or lazy config, or a loaded one (`overrides` must then be empty).
        overrides: `key=value` strings.
        register: `NAME=annotations.json,image_dir[,semantic_dir]` strings, beside those of the
            config itself (`DATASETS.REGISTER`, `dataloader.register`).
        with_data: False for prediction, which works without the data sets of the config.
        eval_only: whether the training sets are not needed; they may be gone.

    Raises:
        UserError: anything wrong with the config, the data sets or their classes.
    """
    is_path = isinstance(config, (str, os.PathLike))
    cfg: Any = load_config(os.fspath(config), overrides) if is_path else config
    experiment = LazyExperiment(cfg) if is_lazy(cfg) else YacsExperiment(cfg)
    experiment.note_chosen(overrides)
    check_limits(experiment)
    register_all()
    if with_data:
        take_data(experiment, register, eval_only)
    texts = [absolute_register(text) for text in [*experiment.registered(), *register]]
    texts = list(dict.fromkeys(texts))
    if not with_data:
        experiment.unread = texts
        return experiment
    needed = {*experiment.test_sets(), *(parse_register(text).name for text in register)}
    for text in texts:
        spec = parse_register(text)
        if not eval_only or spec.name in needed:
            register_coco_dataset(*spec)
    experiment.set_registered(texts)
    _check_data_sets(experiment, eval_only)
    _fit_classes(experiment, overrides)
    return experiment


def _check_data_sets(experiment: Experiment, eval_only: bool) -> None:
    known = DatasetCatalog.list()
    names = experiment.test_sets()
    if not experiment.train_sets() + names:
        key = experiment.name_of("DATASETS.TRAIN", "dataloader.train.dataset")
        raise UserError(f"{key} is empty, and so is the test set; name a data set")
    for name in names if eval_only else experiment.train_sets() + names:
        if name not in known:
            raise UserError(
                f"data set '{name}' is not registered{nearest(name, known)}; "
                f"--register {name}=annotations.json,image_dir adds COCO-format data"
            )


def _fit_classes(experiment: Experiment, overrides: Sequence[str]) -> None:
    """The data decide how many classes there are; an explicit override may only agree with them."""
    known = set(DatasetCatalog.list())  # all, unless training sets are not needed
    train_sets = [name for name in experiment.train_sets() if name in known]
    names = train_sets + experiment.test_sets()
    if not names or not all(_has_class_names(name) for name in names):
        return  # a data set of another kind, whose owner sets the numbers
    count = _shared_classes(experiment, train_sets)
    for override in parse_overrides(overrides):
        same = {override.key, YAML_TO_LAZY.get(override.key), LAZY_TO_YAML.get(override.key)}
        if same & set(_CLASS_KEYS) and override.value != count:
            raise UserError(
                f"{override.key} is {override.value}, but data set '{names[0]}' has {count} "
                "classes; leave the key out, it is set from the data"
            )
    semantic = None
    if experiment.semantic_mode() != "none" and train_sets == experiment.train_sets() != []:
        semantic = semantic_num_labels(train_sets, experiment.semantic_mode())
    if experiment.num_classes() != count:
        logger.info("the data set has %d classes; the model is built for them", count)
    experiment.set_num_classes(count, semantic)


def _shared_classes(experiment: Experiment, train: list[str]) -> int:
    """Number of classes of the data; a test set that was forgotten is named by its key."""
    test = experiment.test_sets()
    if train and test:
        dataset_classes(train)
        dataset_classes(test)
        try:
            return len(dataset_classes(train + test))
        except UserError as error:
            key = experiment.name_of("DATASETS.TEST", "dataloader.test.dataset")
            raise UserError(
                f"{error}; set {key} to the test set of '{train[0]}', or to [] for none"
            ) from error
    return len(dataset_classes(train + test))


def _has_class_names(name: str) -> bool:
    return bool(getattr(MetadataCatalog.get(name), "thing_classes", None))


def check_runnable(experiment: Experiment, model: Module) -> None:
    """Refuse settings that are known to fail later, before anything long starts.

    Raises:
        UserError: float16 without a GPU; a batch that has no equal parts; frozen batch norm on
            random weights; a test set without an evaluator.
    """
    on_gpu = experiment.device.startswith("cuda")
    if experiment.amp and experiment.amp_dtype == "float16" and not on_gpu:
        raise UserError(
            f"float16 mixed precision needs a GPU, but the device is '{experiment.device}'; set "
            "SOLVER.AMP.DTYPE=bfloat16 (yaml) or train.amp.dtype=bfloat16 (lazy), or "
            "SOLVER.AMP.ENABLED=false (yaml) or train.amp.enabled=false (lazy)"
        )
    size = experiment.setting("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    parts = experiment.accumulation_steps * comm.get_world_size()
    if experiment.accumulation_steps > 1 and isinstance(size, int) and size % parts:
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS / train.accumulation_steps is "
            f"{experiment.accumulation_steps}, but a batch of {size} images in "
            f"{comm.get_world_size()} processes has no so many equal parts; make the batch "
            "(SOLVER.IMS_PER_BATCH / dataloader.train.total_batch_size) a multiple of "
            f"{parts}"
        )
    if not experiment.train_sets():
        raise UserError(
            f"{experiment.name_of('DATASETS.TRAIN', 'dataloader.train.dataset')} is empty; name a "
            "data set to train on"
        )
    for name in experiment.test_sets():
        evaluator_kind(name)
    if not experiment.init_checkpoint and _has_frozen_statistics(model):
        raise UserError(
            "the backbone has frozen batch norm but no weights are loaded, which diverges at once; "
            "set MODEL.WEIGHTS / train.init_checkpoint, or use norm 'GN' or 'BN'"
        )


def make_output_folder(folder: str) -> None:
    """Create the output folder; a `UserError` names it if that is impossible."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output folder '{folder}' cannot be made: {error.strerror}; "
            "set OUTPUT_DIR (yaml) or train.output_dir (lazy)"
        ) from error


def start_log(experiment: Experiment, args: argparse.Namespace, folder: str) -> None:
    """Set up the log of a run, of which the console shows a few lines until `console.end_brief`.

    What detectron2's `default_setup` does, but for the config, which a command that fails later
    must not overwrite: see `save_config`.

    Args:
        experiment: the run.
        args: of the command line, for the log.
        folder: gets `log.txt`; made if it is not there.
    """
    make_output_folder(folder)
    for name in LOGGERS:
        setup_logger(folder, distributed_rank=comm.get_rank(), name=name)
    begin_brief()
    log_start(experiment, args.config_file, args.opts, os.path.join(folder, "log.txt"))
    start = logging.getLogger("detectron2")
    start.info(
        "Rank of current process: %d. World size: %d", comm.get_rank(), comm.get_world_size()
    )
    start.info("Environment info:\n%s", collect_env_info())
    start.info("Command line arguments: %s", args)
    seed_all_rng(experiment.seed + comm.get_rank() if experiment.seed >= 0 else None)
    torch.backends.cudnn.benchmark = experiment.cudnn_benchmark and not args.eval_only


def save_config(experiment: Experiment, folder: str) -> None:
    """Write the complete config to `folder/config.yaml`, as a whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    if not comm.is_main_process():
        return
    path = os.path.join(folder, "config.yaml")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".config") as temporary:
            portable_copy(experiment).write_config(os.path.join(temporary, "config.yaml"))
            for name in os.listdir(temporary):
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
    logger.info("Full config saved to %s", path)


def check_data(experiment: Experiment, eval_only: bool = False) -> None:
    """Look for mistakes in the data of a training, or of an evaluation only, which leaves the table
    of the training in place; the main process does it for all.

    Raises:
        UserError: in every process, if there is an error.
    """
    mistake = None
    if comm.is_main_process():
        try:
            check_before_training(
                () if eval_only else experiment.train_sets(),
                experiment.test_sets(),
                semantic=experiment.semantic_mode() in ("auto", "dataset"),
                output_dir=None if eval_only else experiment.output_dir,
            )
        except UserError as error:
            mistake = str(error)
    mistake = comm.all_gather(mistake)[0]
    if mistake:
        raise UserError(mistake)


def _has_frozen_statistics(model: Module) -> bool:
    frozen: list[Any] = [
        m for m in model.modules() if isinstance(m, (FrozenBatchNorm2d, EvalStatsBatchNorm2d))
    ]
    return bool(frozen) and all(
        bool((m.running_mean == 0).all()) and bool((m.weight == 1).all()) for m in frozen
    )
