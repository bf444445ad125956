"""The best checkpoint of a training, by a metric of its evaluations, and the end of one that no
longer improves."""

import json
import logging
import math
import os
from typing import Any

from d2ext.checkpoint import Checkpointer
from d2ext.checkpoint.checkpointer import write_atomically
from d2ext.engine.experiment import Experiment
from d2ext.engine.stopping import any_process
from d2ext.errors import UserError

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

NAME = "model_best"
logger = logging.getLogger(__name__)


class EndedEarly(BaseException):
    """Leaves the training loop, in every process, when the metric no longer improves."""


class BestCheckpoint:
    """Keeps `model_best.pth`, the weights with the highest value of a metric, and
    `model_best.json`, the values of all evaluations, from which a resumed training goes on.

    Args:
        checkpointer: of the run.
        experiment: its `best_metric` (`""`: do nothing) and `early_stopping` (number of evaluations
            in a row without a higher value after which to end; 0: never).

    Raises:
        UserError: there is a metric but no evaluation during the training, or patience without one.
    """

    def __init__(self, checkpointer: Checkpointer, experiment: Experiment):
        self.metric, self.patience = experiment.best_metric, experiment.early_stopping
        self._checkpointer = checkpointer
        self._path = os.path.join(checkpointer.save_dir, f"{NAME}.json")
        self._values: dict[int, float] = {}
        if self.patience and not self.metric:
            raise UserError(
                "TEST.EARLY_STOPPING / train.early_stopping needs a metric; set TEST.BEST_METRIC "
                "(yaml) or train.best_metric (lazy), e.g. segm/AP"
            )
        if self.metric and not (experiment.eval_period > 0 and experiment.test_sets()):
            raise UserError(
                f"the best checkpoint by '{self.metric}' needs evaluations during the training; "
                "set TEST.EVAL_PERIOD (yaml) or train.eval_period (lazy), and a test set"
            )

    def resume(self, iteration: int) -> None:
        """Read the values of the evaluations before an iteration."""
        if not self.metric or not iteration or not os.path.isfile(self._path):
            return
        try:
            with open(self._path, encoding="utf-8") as f:
                known = json.load(f)
            values = {int(key): float(value) for key, value in known["values"].items()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            logger.warning("'%s' cannot be read (%s): the best starts anew", self._path, error)
            return
        if known.get("metric") == self.metric:
            self._values = {key: value for key, value in values.items() if key < iteration}

    @property
    def exhausted(self) -> bool:
        """Whether the last `early_stopping` evaluations were not better than one before."""
        values = list(self._values.values())
        return 0 < self.patience <= len(values) - 1 - _first_best(values)

    def update(self, results: dict[str, Any], iteration: int) -> None:
        """Judge the evaluation after `iteration`; called in every process, the main one decides."""
        if self.metric and comm.is_main_process():
            self._judge(flatten_results_dict(results), iteration)

    def _judge(self, results: dict[str, float], iteration: int) -> None:
        value = results.get(self.metric)
        if value is None or not math.isfinite(value):
            logger.warning(
                "no best checkpoint: '%s' (TEST.BEST_METRIC / train.best_metric) is %s; known: %s",
                self.metric,
                "no result" if value is None else value,
                ", ".join(results),
            )
            return
        before = [v for i, v in self._values.items() if i < iteration]
        try:
            if value > max(before, default=-math.inf):
                logger.info("%s is %.4f, the best so far", self.metric, value)
                self._checkpointer.save_weights(NAME, iteration=iteration, best=value)
            self._values = {**self._values, iteration: value}
            text = json.dumps({"metric": self.metric, "values": self._values})
            write_atomically(self._path, lambda f: f.write(text.encode()))
        except UserError as error:
            logger.warning("%s; the training goes on", error)


class EndEarly(HookBase):
    """After an evaluation, save `model_final` and leave the loop if the metric does not improve."""

    def __init__(self, best: BestCheckpoint, checkpointer: Checkpointer):
        self._best, self._checkpointer = best, checkpointer

    def before_train(self):
        self._check(self.trainer.start_iter - 1)  # a run that had ended stays as it is

    def after_step(self):
        self._check(self.trainer.iter)

    def _check(self, iteration: int) -> None:
        # Without patience this costs no communication.
        if self._best.patience and any_process(self._best.exhausted):
            logger.warning(
                "%s has not improved in %d evaluations: the training ends after iteration %d "
                "(TEST.EARLY_STOPPING=0 / train.early_stopping=0 goes on)",
                self._best.metric,
                self._best.patience,
                iteration,
            )
            if self.trainer.iter == iteration:  # not of a run that had ended
                self._checkpointer.save("model_final", iteration=iteration)
            raise EndedEarly


def _first_best(values: list[float]) -> int:
    return values.index(max(values)) if values else -1
