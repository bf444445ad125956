"""From a config and a data set to a predictor in one call, for notebooks and short programs."""

import argparse
import contextlib
import copy
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from d2ext.config import find_config, is_lazy, load_config
from d2ext.config.overrides import apply_to_lazy, apply_to_yaml, parse_overrides
from d2ext.data import get_dataset_records
from d2ext.engine.best import NAME as BEST
from d2ext.engine.console import LOGGERS
from d2ext.engine.experiment import Experiment
from d2ext.engine.folder import training_folder
from d2ext.engine.limits import check_device
from d2ext.engine.loop import train
from d2ext.engine.predictor import Predictor
from d2ext.engine.recipe_rules import choose_length
from d2ext.engine.resuming import FINAL
from d2ext.engine.setup import build_experiment, check_data, make_output_folder, start_log
from d2ext.engine.user_hooks import Hook
from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

Paths = Sequence[str | os.PathLike]
DataSet = str | Paths


class Fitted(NamedTuple):
    """What `fit` gives: `predictor, results = fit(...)`."""

    predictor: Predictor
    # Of the last evaluation, as `train` gives them; {} without a test set.
    results: dict[str, Any]


def fit(
    config: str | os.PathLike | CfgNode | DictConfig,
    data: DataSet | Mapping[str, DataSet],
    output_dir: str | os.PathLike = "./output/fit",
    *,
    max_iter: int | None = None,
    epochs: float | None = None,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Fitted:
    """Train a network and give it back, ready to predict.

    Args:
        config: name of a shipped config, with or without its ending (`"htc_tiny"`; that in yaml
            comes first), a path, or a loaded config, which stays as it is.
        data: a registered name, or `(annotations.json, image_folder[, semantic_folder])` in COCO's
            format; or `{"train": one of these, "test": one of these}`. Without a test set nothing
            is evaluated.
        output_dir: as of every training: checkpoints, metrics, `log.txt`.
        max_iter: steps of the optimiser; default: the config's.
        epochs: or how often each image is seen.
        hooks: see `train`.
        resume, overwrite: see `train`.
        overrides: settings by their yaml or lazy key, `**{"SOLVER.BASE_LR": 1e-3}`.

    Returns:
        (predictor, results); the weights are the best ones if the config has a metric for that,
        else the last ones.

    Raises:
        UserError: as the command line; `data` has another form; both lengths are given.
    """
    if max_iter is not None and epochs is not None:
        raise UserError("give max_iter or epochs, not both")
    settings = {**overrides, "OUTPUT_DIR": os.fspath(output_dir)}
    if max_iter is not None:
        settings["SOLVER.MAX_ITER"] = max_iter
    named, texts = _data_sets(data)
    settings.update(named)
    experiment = _build(config, settings, texts)
    if epochs is not None:
        settings["SOLVER.MAX_ITER"] = _iterations(experiment, epochs)
        experiment = _build(config, settings, texts)
    check_device(experiment)
    folder = experiment.output_dir
    make_output_folder(folder)
    args = argparse.Namespace(
        config_file=str(config) if isinstance(config, (str, os.PathLike)) else "given as an object",
        opts=_texts(settings),
        eval_only=False,
    )
    with training_folder(folder, resume, overwrite), _own_log():
        start_log(experiment, args, folder)
        check_data(experiment)
        results = train(experiment, resume=resume, hooks=hooks)
    best = os.path.join(folder, f"{BEST}.pth")
    chosen = best if experiment.best_metric and os.path.isfile(best) else None
    return Fitted(Predictor(experiment, chosen or os.path.join(folder, FINAL)), results)


def _data_sets(data: DataSet | Mapping[str, DataSet]) -> tuple[dict[str, Any], list[str]]:
    """Settings that name the data sets, and `--register` texts of those that are files."""
    parts = data if isinstance(data, Mapping) else {"train": data}
    unknown = sorted(set(parts) - {"train", "test"})
    if unknown or "train" not in parts:
        raise UserError(
            f"data has {', '.join(map(repr, parts)) or 'nothing'}; its parts are 'train' and, for "
            "an evaluation, 'test'"
        )
    settings: dict[str, Any] = {"DATASETS.TRAIN": [], "DATASETS.TEST": []}
    texts = []
    for part, dataset in parts.items():
        name = dataset
        if not isinstance(dataset, str):
            name, text = _registered(part, dataset)
            texts.append(text)
        settings[f"DATASETS.{part.upper()}"] = [name]
    return settings, list(dict.fromkeys(texts))


def _registered(part: str, paths: Paths) -> tuple[str, str]:
    """A name for files, the same one for the same files, and the text that registers them."""
    if not isinstance(paths, (list, tuple)) or len(paths) not in (2, 3):
        raise UserError(
            f"the data set '{part}' is {paths!r}; it has to be a registered name or "
            "(annotations.json, image_folder)"
        )
    full = [os.path.abspath(os.fspath(path)) for path in paths]
    digest = hashlib.sha256("\n".join(full).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.\-]", "_", f"{Path(full[0]).stem}_{digest}")
    return name, f"{name}={','.join(full)}"


def _texts(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _build(config: Any, settings: Mapping[str, Any], texts: Sequence[str]) -> Experiment:
    overrides = _texts(settings)
    if isinstance(config, (str, os.PathLike)):
        cfg = load_config(find_config(config), overrides)
    else:
        cfg = copy.deepcopy(config)
        apply = apply_to_lazy if is_lazy(cfg) else apply_to_yaml
        if not is_lazy(cfg):
            cfg.defrost()
        apply(cfg, parse_overrides(overrides))
    experiment = build_experiment(cfg, register=texts)
    experiment.note_chosen(overrides)
    return experiment


def _iterations(experiment: Experiment, epochs: float) -> int:
    if not epochs > 0 or math.isinf(epochs):
        raise UserError(f"epochs is {epochs}; it has to be a number above 0")
    filtered = experiment.setting(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "dataloader.train.filter_empty"
    )
    images = len(get_dataset_records(experiment.train_sets(), filtered is not False))
    size = experiment.setting("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    return choose_length(epochs, images, size, given=True).value


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """Logging of a `with` block ends with it: the next call in one process has another folder."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    saved = [(x, x.handlers[:], x.propagate, x.level) for x in loggers]
    try:
        yield
    finally:
        for logger, handlers, propagate, level in saved:
            for handler in set(logger.handlers) - set(handlers):
                handler.flush()
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        getattr(setup_logger, "cache_clear", lambda: None)()
