"""One training loop, one evaluation and one predictor for both kinds of config."""

from d2ext import compat

compat.require_detectron2()
compat.patch_data()
compat.patch_evaluation()

from d2ext.engine.cli import main  # noqa: E402
from d2ext.engine.experiment import Experiment  # noqa: E402
from d2ext.engine.loop import evaluate, train  # noqa: E402
from d2ext.engine.predictor import Predictor  # noqa: E402
from d2ext.engine.setup import build_experiment  # noqa: E402

__all__ = ["Experiment", "Predictor", "build_experiment", "evaluate", "main", "train"]
