"""detectron2's inference loop with a progress bar."""

import sys
from typing import Any

from tqdm import tqdm

from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm


class _WithProgress:
    """A sized iterable that shows how far its consumer is (main process, terminals only)."""

    def __init__(self, loader, label: str):
        self._loader, self._label = loader, label

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self):
        quiet = not comm.is_main_process() or not sys.stderr.isatty()
        yield from tqdm(self._loader, desc=self._label, unit="img", disable=quiet, leave=False)


def run_inference(model, loader, evaluator: DatasetEvaluator, label: str = "") -> dict[str, Any]:
    """Run `model` over `loader` and evaluate what it finds.

    Args:
        model: takes a batch of `loader`; put into evaluation mode meanwhile.
        loader: sized iterable of batches.
        evaluator: detectron2 evaluator.
        label: shown in front of the progress bar.

    Returns:
        `{task: {metric: value}}`; `{}` on all but the main process.
    """
    return inference_on_dataset(model, _WithProgress(loader, label or "evaluating"), evaluator)
