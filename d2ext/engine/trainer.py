"""detectron2's trainers, which say what a batch with a NaN or infinite loss was."""

import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from d2ext.engine.stopping import any_process
from d2ext.errors import UserError

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

# So many skipped batches in a row are no accident of the data.
MAX_SKIPPED_IN_A_ROW = 20
logger = logging.getLogger(__name__)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


# detectron2 logs a traceback of whatever ends a training; a user's mistake is one line, printed by
# the command line.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)


class _Remembering:
    """A loader that keeps the batch it gave last."""

    def __init__(self, loader):
        self._loader, self.batch = loader, []

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self._loader:
            self.batch = batch
            yield batch


class CheckedTrainer(SimpleTrainer):
    """A trainer that ends, before the step is taken, with one message that names the images of a
    batch with a NaN or infinite loss, or leaves the batch out.

    Args:
        model, data_loader, optimizer: as in detectron2.
        output_dir: gets a file to reproduce the failure, `nonfinite_0000012.pth`: the batch, the
            losses and the weights.
        skip: leave out such a batch and count it as `skipped_iterations` in metrics.json.
    """

    def __init__(self, model, data_loader, optimizer, *, output_dir: str, skip: bool = False):
        self._remembering = _Remembering(data_loader)
        super().__init__(model, self._remembering, optimizer)
        self._output_dir, self._skip = output_dir, skip
        self._skipped = self._in_a_row = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run_step(self):
        if self._skip:  # the forward pass changes them, with NaN for good
            self._statistics = [
                (buffer, buffer.clone())
                for module in self.model.modules()
                if isinstance(module, _BatchNorm)
                for buffer in module.buffers(recurse=False)
            ]
        try:
            super().run_step()
        except FloatingPointError as error:  # before there is a loss
            self._end_or_leave_out(str(error))

    def _end_or_leave_out(self, reason: str) -> None:
        """Of several processes, the others have a loss and wait for gradients: all have to end."""
        images = f"{reason.rstrip('.')}, images {self._images()}"
        if self._skip and self._in_a_row < MAX_SKIPPED_IN_A_ROW and comm.get_world_size() == 1:
            self.optimizer.zero_grad(set_to_none=True)
            self._count(images)
        else:
            raise UserError(self._message(images, self._save({}))) from None

    def _write_metrics(self, loss_dict, data_time, *args, **kwargs):
        """Called between the backward pass and the step of the optimiser."""
        losses = {name: float(value.detach()) for name, value in loss_dict.items()}
        if not any_process(not all(map(math.isfinite, losses.values()))):
            self._in_a_row = 0
            super()._write_metrics(loss_dict, data_time, *args, **kwargs)
        elif self._skip and self._in_a_row < MAX_SKIPPED_IN_A_ROW:
            self._leave_out(losses)
        else:
            raise UserError(self._message(self._describe(losses), self._save(losses)))

    def _leave_out(self, losses: dict[str, float]) -> None:
        scaler = getattr(self, "grad_scaler", None)
        if scaler is None:
            self.optimizer.zero_grad(set_to_none=True)  # no step for any parameter
        else:  # which wants gradients, and skips the step if they are not finite
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.fill_(math.nan)
        self._count(self._describe(losses))

    def _count(self, known: str) -> None:
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self._skipped += 1
        self._in_a_row += 1
        if comm.is_main_process():
            get_event_storage().put_scalar(
                "skipped_iterations", self._skipped, smoothing_hint=False
            )
            logger.warning("iteration %d is left out: %s", self.iter, known)

    def _describe(self, losses: dict[str, float]) -> str:
        """Losses and images of the processes with a loss that is not finite. Collective."""
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        good = {name: value for name, value in losses.items() if name not in bad}
        text = f"{_listed(bad)} (finite: {_listed(good) or 'none'}), images {self._images()}"
        return "; ".join(filter(None, comm.all_gather(text if bad else "")))

    def _images(self) -> str:
        return ", ".join(
            f"{x.get('image_id')} ({x.get('file_name')})" for x in self._remembering.batch
        )

    def _message(self, what: str, place: str) -> str:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        again = "after so many skipped batches the cause is not the data; " if self._skip else ""
        return (
            f"NaN or infinite loss in iteration {self.iter}: {what}; learning "
            f"rate {max(rates):g}; {again}{place}; lower SOLVER.BASE_LR / optimizer.lr, lengthen "
            "the warm-up or clip gradients, and look at these images; SOLVER.SKIP_NONFINITE=true "
            "(yaml) or train.skip_nonfinite=true (lazy) leaves such batches out"
        )

    def _save(self, losses: dict[str, float]) -> str:
        """Write the file to reproduce it, one for each process; words about where it is."""
        rank = f".rank{comm.get_rank()}" if comm.get_rank() else ""
        path = os.path.join(self._output_dir, f"nonfinite_{self.iter:07d}.pth{rank}")
        content = {"iteration": self.iter, "losses": losses, "batch": self._remembering.batch}
        try:
            torch.save({**content, "model": self.model.state_dict()}, path)
        except (OSError, RuntimeError) as error:
            return f"'{path}' cannot be written ({' '.join(str(error).split())[:80]})"
        return f"the batch and the weights are in '{path}'"

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "skipped_iterations": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = state_dict.get("skipped_iterations", 0)
        super().load_state_dict(state_dict)


class CheckedAMPTrainer(CheckedTrainer, AMPTrainer):
    """The same with mixed precision."""


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in losses.items())
