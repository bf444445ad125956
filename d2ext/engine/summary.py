"""The lines about a run that the console shows before its first iteration."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from d2ext.checkpoint import Checkpointer
from d2ext.data import get_dataset_records
from d2ext.engine.console import log_file_only
from d2ext.engine.experiment import Experiment
from d2ext.version import __version__

from detectron2 import __version__ as detectron2_version
from detectron2.utils import comm

_SHOWN = 8  # groups of arrays in one line

logger = logging.getLogger(__name__)


class SummingCheckpointer(Checkpointer):
    """Says in one line what weights of a file are used; `log.txt` names them all."""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        if not path:
            logger.info("weights: none are loaded, all start anew")
        return super().load(path, checkpointables)

    def _log_incompatible_keys(self, incompatible) -> None:
        with log_file_only():
            super()._log_incompatible_keys(incompatible)
        other = [name for name, *_ in incompatible.incorrect_shapes]
        anew = sorted({*incompatible.missing_keys, *other})
        total = len(self.model.state_dict())
        parts = [f"{total - len(anew)} of {total} arrays of the model"]
        if anew:
            parts.append(f"anew start {_groups(anew)}")
        if other:
            parts.append(f"{len(other)} of these have another shape in the file, e.g. {other[0]}")
        unused = incompatible.unexpected_keys
        if unused:
            parts.append(f"not used are {_groups(unused)}")
        level = logging.WARNING if other else logging.INFO
        logger.log(level, "weights %s: %s", self._source, "; ".join(parts))


def log_start(experiment: Experiment, config_file: str, overrides: Sequence[str], log: str) -> None:
    """Versions, device, config and folders; the first lines of a run."""
    count = comm.get_world_size()
    gpu = torch.device(experiment.device).type == "cuda" and torch.cuda.is_available()
    device = f"{experiment.device} ({torch.cuda.get_device_name()})" if gpu else experiment.device
    logger.info(
        "d2ext %s, detectron2 %s, PyTorch %s, %s%s",
        __version__,
        detectron2_version,
        torch.__version__,
        f"{count} processes on {device}" if count > 1 else f"device {device}",
        f", seed {experiment.seed}",
    )
    changed = " ".join(overrides)
    logger.info("config %s%s", config_file, f" with {_shortened(changed)}" if changed else "")
    logger.info("output folder %s, the whole log is %s", experiment.output_dir, log)


def log_test_data(experiment: Experiment) -> None:
    """Images and instances of the test sets, before the training; loading them says so."""
    if comm.is_main_process():
        for name in experiment.test_sets():
            get_dataset_records(name)


def log_model(experiment: Experiment, model: torch.nn.Module) -> None:
    """The network and its size; `log.txt` has the modules."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    heads = getattr(model, "roi_heads", None)
    logger.info(
        "model %s%s: %.2f million parameters%s, %d classes",
        type(model).__name__,
        "" if heads is None else f" with {type(heads).__name__}",
        total / 1e6,
        f", {trained / 1e6:.2f} of them trained" if trained < total else "",
        experiment.num_classes(),
    )


def log_schedule(
    experiment: Experiment, optimizer: torch.optim.Optimizer, start_iter: int, num_images: int
) -> None:
    """Length of the training, and what happens on the way."""
    size = experiment.setting("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    length = f"{experiment.max_iter} iterations"
    if isinstance(size, int):
        length += f" of {size} images"
        length += f" ({experiment.max_iter * size / num_images:.1f} epochs)" if num_images else ""
    if start_iter:
        length += f", continued at {start_iter}"
    name = next(n.__name__ for n in type(optimizer).__mro__ if n.__module__.startswith("torch."))
    logger.info("schedule %s, %s, learning rate %g", length, name, optimizer.defaults["lr"])
    keep = f", the last {experiment.checkpoint_keep} kept" if experiment.checkpoint_keep else ""
    period = experiment.eval_period
    evaluated = "no evaluation"
    if experiment.test_sets():
        often = f"every {period} iterations and " if period else ""
        evaluated = f"evaluation {often}after the last one"
    logger.info(
        "checkpoints every %d iterations%s; %s", experiment.checkpoint_period, keep, evaluated
    )


def _groups(names: Iterable[str]) -> str:
    """`backbone (12), roi_heads.mask_head (10)`: numbers of arrays by the first parts of names."""
    names = list(names)
    counts = Counter(name.split(".")[0] for name in names)
    if len(counts) < 3:
        counts = Counter(".".join(name.split(".")[:-1][:2]) or name for name in names)
    shown = [f"{name} ({count})" for name, count in counts.most_common(_SHOWN)]
    return ", ".join(shown) + (" ..." if len(counts) > _SHOWN else "")


def _shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."
