"""Optional writers: Weights & Biases and MLflow get what metrics.json gets."""

import importlib
import os
import re
from collections.abc import Callable, Sequence
from types import ModuleType

from d2ext.checkpoint.checkpointer import write_atomically
from d2ext.errors import UserError

from detectron2.utils.events import EventWriter, get_event_storage

_KEYS = "LOG_WRITERS / train.log_writers"


class RemoteWriter(EventWriter):
    """Sends every scalar that is new, without smoothing, to a service that keeps runs.

    The id of the run is kept in the output folder, so that a resumed training goes on with it.

    Args:
        output_dir: of the run; its last part is the title.
        module: the imported package.
    """

    name: str

    def __init__(self, output_dir: str, module: ModuleType):
        self._module, self._last = module, -1
        self._folder = os.path.abspath(output_dir)
        self._id_file = os.path.join(self._folder, f"{self.name}_run")

    def open(self) -> None:
        """Begin a run of the service, or go on with that of the output folder.

        Raises:
            UserError: the package or the service refuses.
        """
        known = None
        if os.path.isfile(self._id_file):
            with open(self._id_file, encoding="utf-8") as f:
                known = f.read().strip()
        try:
            run = self._start(known, os.path.basename(self._folder))
        except Exception as error:  # of a package with errors of its own
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{_KEYS}: {self.name} cannot start a run ({type(error).__name__}: {reason}); "
                "leave it out to train without"
            ) from error
        if run != known:
            write_atomically(self._id_file, lambda f: f.write(run.encode()))

    def write(self):
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest().items():
            if iteration > self._last:
                by_iteration.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(by_iteration):
            self._last = iteration
            self._try(lambda i=iteration: self._send(by_iteration[i], i))

    def close(self):
        self._try(self._end)

    def _try(self, function: Callable[[], None]) -> None:
        """A service that is away must not end a training: an `OSError`, for `PatientWriter`."""
        try:
            function()
        except Exception as error:
            raise OSError(" ".join(str(error).split())[:160]) from error

    def _start(self, known: str | None, title: str) -> str:
        """Open a run, or the known one again; its id."""
        raise NotImplementedError

    def _send(self, values: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class WandbWriter(RemoteWriter):
    """Weights & Biases; its own environment variables choose the account and the project."""

    name = "wandb"

    def _start(self, known, title):
        project = os.environ.get("WANDB_PROJECT", "d2ext")
        self._run = self._module.init(
            project=project, name=title, dir=self._folder, id=known, resume="allow"
        )
        return str(self._run.id)

    def _send(self, values, iteration):
        self._run.log(values, step=iteration)

    def _end(self):
        self._run.finish()


class MlflowWriter(RemoteWriter):
    """MLflow; its own environment variables choose the server and the experiment."""

    name = "mlflow"

    def _start(self, known, title):
        run = self._module.start_run(run_id=known, run_name=None if known else title)
        return str(run.info.run_id)

    def _send(self, values, iteration):
        values = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in values.items()}
        self._module.log_metrics(values, step=iteration)

    def _end(self):
        self._module.end_run()


WRITERS: dict[str, type[RemoteWriter]] = {w.name: w for w in (WandbWriter, MlflowWriter)}


def remote_writers(names: Sequence[str], output_dir: str) -> list[RemoteWriter]:
    """The writers of a run, not yet open; their packages are imported.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    writers = []
    for name in names:
        if name not in WRITERS:
            raise UserError(f"{_KEYS} has '{name}'; valid names: {', '.join(WRITERS)}")
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{_KEYS} has '{name}', whose package is not installed: pip install {name}"
            ) from error
        writers.append(WRITERS[name](output_dir, module))
    return writers
