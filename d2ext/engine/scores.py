"""The numbers of an evaluation as a file, beside the detections that they are of."""

import hashlib
import json
import math
import os
from typing import Any

from d2ext.checkpoint.checkpointer import write_atomically
from d2ext.engine.experiment import Experiment


def write_scores(experiment: Experiment, weights: str, results: dict[str, Any]) -> None:
    """Write `inference/scores.json` into the output folder: which weights, with their SHA-256 if
    they are a file here, and by test set what the evaluation gave. What is not defined (NaN, such
    as the AP of a class without objects) is null.

    Args:
        results: of `evaluate`: of one test set, or of several by name.
    """
    names = experiment.test_sets()
    by_set = {names[0]: results} if len(names) == 1 else results
    content = {"weights": weights, "sha256": file_digest(weights), "results": _numbers(by_set)}
    folder = os.path.join(experiment.output_dir, "inference")
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(os.path.join(folder, "scores.json"), lambda f: f.write(text.encode()))


def file_digest(path: str) -> str | None:
    """SHA-256 of a file in hexadecimal digits; None if there is no such file here."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _numbers(x) for key, x in value.items()}
    number = float(value)
    return number if math.isfinite(number) else None
