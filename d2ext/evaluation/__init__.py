"""Evaluators, chosen by the metadata of the data set."""

from d2ext import compat

compat.patch_evaluation()

from d2ext.evaluation.build import build_evaluator  # noqa: E402
from d2ext.evaluation.inference import run_inference  # noqa: E402

__all__ = ["build_evaluator", "run_inference"]
