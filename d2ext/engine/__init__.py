"""One training loop, one evaluation and one predictor for both kinds of config."""

from d2ext import compat

compat.require_detectron2()
compat.patch_data()
compat.patch_evaluation()

from d2ext.engine.cli import main
from d2ext.engine.experiment import Experiment
from d2ext.engine.fitting import Fitted, fit
from d2ext.engine.loop import evaluate, train
from d2ext.engine.predictor import Predictor
from d2ext.engine.setup import build_experiment

__all__ = [
    "Experiment",
    "Fitted",
    "Predictor",
    "build_experiment",
    "evaluate",
    "fit",
    "main",
    "train",
]
