"""detectron2's trainer, with mixed precision on any device and batches in parts, which says what a
batch with a NaN or infinite loss was."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from d2ext.checkpoint import preserve_rng
from d2ext.engine.stopping import any_process
from d2ext.errors import UserError
from d2ext.modeling.parts import BatchInParts

from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

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
        parts: a batch is computed in so many parts of equal length, whose gradients add up to one
            step: gradient accumulation. Losses that divide by counts of the whole batch (see
            `d2ext.modeling.parts`) cost one more forward pass, which measures these.
        precision: dtype of mixed precision; None: none. With float16, losses are scaled.
        first: gives the context of the first step, in which mistakes of the settings show.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        output_dir: str,
        skip: bool = False,
        parts: int = 1,
        precision: torch.dtype | None = None,
        first: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self._remembering = _Remembering(data_loader)
        super().__init__(model, self._remembering, optimizer)
        self._output_dir, self._skip, self._parts = output_dir, skip, parts
        self._context = first
        self._skipped = self._in_a_row = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        self._precision = precision
        half = precision == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self._device) if half else None
        self._has_counts = True  # until a batch shows that the losses have none

    def run_step(self):
        """One step of the optimiser; the order of things is that of detectron2's trainers."""
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self._skip:  # the forward pass changes them, with NaN for good
            self._statistics = self._batch_norm_statistics()
        try:
            with self._context():
                losses = self._losses_in_parts(batch) if self._parts > 1 else self._losses(batch)
            self._context = contextlib.nullcontext
        except FloatingPointError as error:  # before there is a loss
            self._end_or_leave_out(str(error))
            return
        getattr(self, "after_backward", lambda: None)()  # hooks of detectron2's main branch
        self._write_metrics(losses, data_time)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _losses(self, batch: list[dict], first: bool = True, share: float = 1) -> dict:
        """Losses of a batch, or of a part, whose gradients are added to those of the first."""
        with self._autocast():
            losses = self.model(batch)
            losses = {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses
            total: Any = sum(losses.values())
        if first:
            self.optimizer.zero_grad()
        total = total if share == 1 else total * share
        (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()
        return losses

    def _losses_in_parts(self, batch: list[dict]) -> dict:
        """As `_losses`, means over the parts; processes exchange gradients with the last one."""
        if len(batch) % self._parts:
            raise UserError(
                f"a batch of {len(batch)} images cannot be cut into {self._parts} equal parts; "
                "change SOLVER.ACCUMULATION_STEPS / train.accumulation_steps or the batch size"
            )
        whole = BatchInParts(batch, self._parts)
        if self._has_counts:
            self._measure(whole)
            self._has_counts = whole.has_counts
        several = isinstance(self.model, DistributedDataParallel)
        means: dict[str, torch.Tensor] = {}
        for number, part in enumerate(whole.parts):
            waits = several and number + 1 < self._parts
            with self.model.no_sync() if waits else contextlib.nullcontext(), whole.computing():
                losses = self._losses(part, first=number == 0, share=1 / self._parts)
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / self._parts
        return means

    def _measure(self, whole: BatchInParts) -> None:
        """A forward pass that leaves no trace but the counts of the parts."""
        statistics = self._batch_norm_statistics()
        model: Any = getattr(self.model, "module", self.model)
        with preserve_rng(), torch.no_grad(), EventStorage(self.iter):
            for part in whole.parts:
                with whole.measuring(), self._autocast():
                    model(part)
        for buffer, before in statistics:
            buffer.copy_(before)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._precision)

    def _batch_norm_statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (buffer, buffer.clone())
            for module in self.model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]

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
        if self.grad_scaler is None:
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
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
        return {**super().state_dict(), "skipped_iterations": self._skipped, **scaler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = state_dict.get("skipped_iterations", 0)
        super().load_state_dict(state_dict)
        if self.grad_scaler and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in losses.items())
