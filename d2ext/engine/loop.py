"""The training loop and the evaluation, for every model and both kinds of config.

detectron2's trainers, hooks, writers and checkpointer do the work; its `DefaultTrainer` is not
used: in v0.6 its checkpoints hold no optimiser state, so that a resumed run starts over at warm-up.
"""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fvcore.nn.precise_bn import get_bn_modules

from d2ext.checkpoint import Checkpointer, RNGState, preserve_rng, read_metadata
from d2ext.checkpoint.settings import SETTINGS_KEY, settings_to_config
from d2ext.engine.averaging import KEY as AVERAGE_KEY
from d2ext.engine.averaging import AverageState, WeightAverage, resume_average
from d2ext.engine.best import BestCheckpoint, EndEarly, EndedEarly
from d2ext.engine.console import end_brief
from d2ext.engine.experiment import Experiment
from d2ext.engine.folder import training_folder
from d2ext.engine.hooks import KeepLastCheckpoints, PatientWriter, SaveCheckpoints
from d2ext.engine.log_writers import RemoteWriter, remote_writers
from d2ext.engine.progress import progress_bar
from d2ext.engine.provenance import (
    CONFIG_KEY,
    check_classes,
    check_stored_settings,
    config_to_store,
    note_classes,
    note_settings,
)
from d2ext.engine.recipe import fit_recipe, is_recipe, recall_recipe
from d2ext.engine.resuming import complete_final_checkpoint, find_last_checkpoint
from d2ext.engine.scores import write_scores
from d2ext.engine.setup import check_runnable, make_output_folder, save_config
from d2ext.engine.stopping import GracefulStop
from d2ext.engine.summary import (
    SummingCheckpointer,
    log_model,
    log_schedule,
    log_test_data,
)
from d2ext.engine.trainer import CheckedTrainer
from d2ext.engine.user_hooks import Hook, as_hooks
from d2ext.engine.yacs_experiment import YacsExperiment
from d2ext.errors import UserError
from d2ext.evaluation import run_inference
from d2ext.modeling.test_time_augmentation import with_test_time_augmentation
from d2ext.solver import freeze_parameters
from d2ext.solver.schedule import make_lr_scheduler

from detectron2.engine import create_ddp_model, hooks
from detectron2.evaluation import print_csv_format, verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter

logger = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    resume: bool = False,
    overwrite: bool = False,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train to `experiment.max_iter`, with checkpoints and evaluations on the way and at the end.

    Args:
        experiment: what to train.
        resume: continue from the last checkpoint in the output folder, if there is one. The
            iterations that follow are those of an uninterrupted run: parameters, optimiser,
            schedule, AMP scaler, generators and order of the data are restored.
        overwrite: move a run that is in the output folder aside.
        hooks: detectron2 `HookBase` objects, or functions that are called with the trainer after
            every step. They run, in their order, after the schedule and the average of the weights
            and before checkpoints, evaluations and writers. The states of those that have
            `state_dict` and `load_state_dict` are in the checkpoints.

    Returns:
        The results of the last evaluation, `{metric: value}`; `{}` without test sets.

    Raises:
        UserError: the settings do not fit the machine or the data; the output folder has a run and
            neither `resume` nor `overwrite` is set; another process trains there.
    """
    make_output_folder(experiment.output_dir)
    with training_folder(experiment.output_dir, resume, overwrite):
        return _train(experiment, resume, as_hooks(hooks))


def _train(experiment: Experiment, resume: bool, user_hooks: list) -> dict[str, Any]:
    _fit_or_recall(experiment, resume)
    seed_all_rng(experiment.seed + comm.get_rank() if experiment.seed >= 0 else None)
    remote = remote_writers(experiment.log_writers, experiment.output_dir)
    experiment.weights_follow = resume and bool(find_last_checkpoint(experiment.output_dir)[0])
    model = experiment.build_model()
    freeze_parameters(model, experiment.freeze)
    check_runnable(experiment, model)
    logger.info("Model:\n%s", model)
    log_model(experiment, model)
    optimizer = experiment.build_optimizer(model)
    scheduler = make_lr_scheduler(optimizer, experiment.build_lr_multiplier(), experiment.max_iter)

    start_path, start_iter = find_last_checkpoint(experiment.output_dir) if resume else ("", 0)
    if resume and not start_path:
        logger.info(
            "no checkpoint in %s: training starts from the beginning", experiment.output_dir
        )
    loader = experiment.build_train_loader(start_iter)
    average = WeightAverage(model, experiment.ema_decay) if experiment.ema_decay else None
    evaluated = average.averaged if average else model
    model = create_ddp_model(model, **_ddp_options(experiment))
    trainer = CheckedTrainer(
        model,
        loader,
        optimizer,
        output_dir=experiment.output_dir,
        skip=experiment.skip_nonfinite,
        parts=experiment.accumulation_steps,
        precision=getattr(torch, experiment.amp_dtype) if experiment.amp else None,
        first=experiment.first_step,
    )

    rng = RNGState()
    extra: dict[str, Any] = {AVERAGE_KEY: AverageState(average)} if average else {}
    checkpointer = SummingCheckpointer(
        model,
        experiment.output_dir,
        metadata=experiment.metadata(),
        weights=average.weights if average else None,
        trainer=weakref.proxy(trainer),
        rng=rng,
        **extra,
    )
    last_results: dict[str, Any] = {}

    stop, best = GracefulStop(checkpointer), BestCheckpoint(checkpointer, experiment)
    best.resume(start_iter)

    def run_evaluation():
        rng.gather()
        with preserve_rng(), stop.evaluation():
            last_results.clear()
            last_results.update(evaluate(experiment, evaluated))
            best.update(last_results, min(trainer.iter, experiment.max_iter - 1))
        return last_results

    bar = progress_bar() if comm.is_main_process() else None
    trainer.register_hooks(
        [
            bar,  # the first that ends: lines about the end come after it
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, scheduler),
            average,
            *user_hooks,
            SaveCheckpoints(checkpointer, experiment.checkpoint_period),
            KeepLastCheckpoints(checkpointer, experiment.checkpoint_keep),
            stop,
            hooks.EvalHook(experiment.eval_period, run_evaluation)
            if experiment.test_sets()
            else None,
            EndEarly(best, checkpointer),
            hooks.PeriodicWriter(_writers(experiment, remote), period=experiment.log_period)
            if comm.is_main_process()
            else None,
        ]
    )
    log_test_data(experiment)
    if start_iter == 0:
        stored = read_metadata(experiment.init_checkpoint)
        note_classes(experiment, stored, experiment.init_checkpoint)
        note_settings(experiment, stored, experiment.init_checkpoint)
        checkpointer.load(experiment.init_checkpoint, checkpointables=[])
        if not experiment.init_checkpoint:
            checkpointer.note_parts()
        _warn_about_norms(model)
        if average:
            average.begin()
    else:
        stored = read_metadata(start_path)
        check_classes(experiment, stored, start_path)
        check_stored_settings(experiment, stored, start_path)
        rest = checkpointer.continue_from(start_path)
        resume_average(average, model, rest, start_path)
    left = settings_to_config(experiment.cfg, checkpointer.metadata.get(SETTINGS_KEY, {}))
    if left:
        logger.info("only in the checkpoints, which d2ext's Predictor reads: %s", ", ".join(left))
    if comm.is_main_process():
        checkpointer.metadata[CONFIG_KEY] = config_to_store(experiment)
    if start_iter >= experiment.max_iter:
        complete_final_checkpoint(checkpointer, start_iter - 1)
    log_schedule(experiment, optimizer, start_iter, _num_images(loader))
    save_config(experiment, experiment.output_dir)  # now: a command that failed has left no trace
    for writer in remote if comm.is_main_process() else ():
        writer.open()
    end_brief()
    with stop.handling_signals(), _closing(loader), contextlib.suppress(EndedEarly):
        trainer.train(start_iter, experiment.max_iter)
    return dict(last_results)


def _fit_or_recall(experiment: Experiment, resume: bool) -> None:
    """The numbers of a recipe: by its rules, or those that the run was started with."""
    path = (
        find_last_checkpoint(experiment.output_dir)[0] if resume and is_recipe(experiment) else ""
    )
    if path:
        recall_recipe(experiment, read_metadata(path), path)
    else:
        fit_recipe(experiment)


def evaluate(experiment: Experiment, model: torch.nn.Module) -> dict[str, Any]:
    """Results on every test set: `{task: {metric: value}}`, one level deeper for several sets."""
    results = OrderedDict()
    for name in experiment.test_sets():
        loader = experiment.build_test_loader(name)  # first: it may generate the files
        evaluator = experiment.build_evaluator(name)
        with _closing(loader):
            results[name] = run_inference(model, loader, evaluator, name)
        if comm.is_main_process():
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    if len(results) == 1:
        return next(iter(results.values()))
    return results


def evaluate_checkpoint(experiment: Experiment, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights that the command line names, else the last ones of the output folder,
    else those of the config; with `resume` the output folder comes first.

    Raises:
        UserError: there are none, or they are not of the whole model.
    """
    files = Checkpointer(torch.nn.Identity(), experiment.output_dir)
    path = experiment.init_checkpoint
    if (resume or not experiment.weights_chosen) and files.has_checkpoint():
        path = files.get_checkpoint_file()
    if not path:
        raise UserError(
            f"nothing to evaluate: '{experiment.output_dir}' has no checkpoint; "
            "set MODEL.WEIGHTS (yaml) or train.init_checkpoint (lazy)"
        )
    stored = read_metadata(path)
    if is_recipe(experiment):
        recall_recipe(experiment, stored, path)
        save_config(experiment, os.path.join(experiment.output_dir, "inference"))
    check_classes(experiment, stored, path)
    check_stored_settings(experiment, stored, path)
    # Those that the weights were trained with: prediction needs no maps.
    experiment.set_num_classes(experiment.num_classes(), stored.get("semantic_labels"))
    model = experiment.build_model()
    log_model(experiment, model)
    SummingCheckpointer(model).load_complete(path)
    model = create_ddp_model(model.eval(), **_ddp_options(experiment))
    if experiment.test_aug["enabled"]:
        sizes = {name: value for name, value in experiment.test_aug.items() if name != "enabled"}
        model = with_test_time_augmentation(model, **sizes)
    end_brief()
    results = evaluate(experiment, model)
    if comm.is_main_process():
        write_scores(experiment, path, results)
        if isinstance(experiment, YacsExperiment):
            verify_results(experiment.cfg, results)
    return results


def _num_images(loader) -> int:
    """0 for a loader of one's own that does not know."""
    dataset = getattr(loader, "dataset", ())
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _ddp_options(experiment: Experiment) -> dict[str, Any]:
    options: dict[str, Any] = dict(broadcast_buffers=False)
    options.update(experiment.ddp)
    if not experiment.device.startswith("cuda"):
        options["device_ids"] = None
    return options


@contextlib.contextmanager
def _closing(loader: Any) -> Iterator[None]:
    """End the loading processes with a `with` block; a loader of a config's own has its own way."""
    try:
        yield
    finally:
        getattr(loader, "close", lambda: None)()


def _writers(experiment: Experiment, remote: Sequence[RemoteWriter]) -> list:
    """Console with ETA, metrics.json with the unsmoothed values, TensorBoard, and others."""
    return [
        CommonMetricPrinter(experiment.max_iter),
        PatientWriter(
            JSONWriter(os.path.join(experiment.output_dir, "metrics.json"), window_size=1)
        ),
        PatientWriter(TensorboardXWriter(experiment.output_dir)),
        *map(PatientWriter, remote),
    ]


def _warn_about_norms(model: torch.nn.Module) -> None:
    if comm.get_world_size() > 1 and any(
        not isinstance(m, torch.nn.SyncBatchNorm) for m in get_bn_modules(model)
    ):
        logger.warning(
            "plain batch norm in several processes: each uses statistics of its own images"
        )
