"""Where a fault is provoked: a small data set, weights, a command line and its outcome."""

import contextlib
import copy
import io
import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

from d2ext.cli.main import main as d2ext_main
from d2ext.engine import Predictor, build_experiment, main, train
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.engine.helpers import short_overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/mask_rcnn_tiny"
_ERROR = re.compile(r"(d2ext [\w-]+: )?error: ")  # the former is argparse's


class Scene:
    """
    Args:
        folder: an empty one.
        images: folder of a small data set: `few.json` and `images`.
        weights: a checkpoint of `mask_rcnn_tiny` as `conftest` makes it.
    """

    def __init__(self, folder, images, weights):
        self.folder, self.source, self.weights = folder, images, weights

    def options(self, *more, kind="yaml", data=None):
        """Arguments of a run of six iterations."""
        data = data or f"few={self.source / 'few.json'},{self.source / 'images'}"
        overrides = short_overrides("mask_rcnn", kind, self.folder / "run", "few")
        return ["--config-file", f"{CONFIG}.{kind}", "--register", data, *overrides, *more]

    def command(self, *more, kind="yaml", data=None):
        """Outcome of `train_net.py` with further arguments, see `outcome_of`."""
        return self.outcome_of(self.options(*more, kind=kind, data=data))

    def d2ext(self, *words):
        """Outcome of a line of the command `d2ext`."""
        return self.outcome_of(words, d2ext_main)

    def outcome_of(self, argv, program=main):
        """Exit status and error line of a command line."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            known = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
            for catalog in (DatasetCatalog, MetadataCatalog):
                catalog.data.pop("few", None)  # as in a process of its own
            try:
                with mock.patch.object(sys, "argv", ["d2ext"]):
                    code = program([str(word) for word in argv]) or 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                for catalog, data in zip((DatasetCatalog, MetadataCatalog), known):
                    catalog.data.clear()
                    catalog.data.update(data)
        lines = [_ERROR.sub("", x) for x in err.getvalue().splitlines() if _ERROR.match(x)]
        if code and len(lines) != 1:
            return f"exit {code}, {err.getvalue()[-2000:]}"
        return self.brief(f"exit {code}: {lines[0]}" if code else "exit 0")

    def experiment(self, *more):
        """The same run from Python."""
        arguments = self.options(*more)
        register, overrides = arguments[3], arguments[4:]
        return build_experiment(f"{CONFIG}.yaml", overrides, [register])

    def train(self, *more, **options):
        """Train from Python."""
        train(self.experiment(*more), **options)

    def outcome(self, function):
        """What a function returns, or its mistake, as one line."""
        try:
            return self.brief(function())
        except UserError as error:
            return self.brief(error)

    def predictor(self, *more):
        """A predictor with the weights."""
        overrides = ["MODEL.RESNETS.NORM=GN", "MODEL.DEVICE=cpu", "INPUT.MIN_SIZE_TEST=64", *more]
        experiment = build_experiment(f"{CONFIG}.yaml", overrides, with_data=False)
        return Predictor(experiment, self.weights)

    def write(self, name, text):
        """Path of a new text file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def data(self, change):
        """`--register` argument of a copy of the data in which `change(content, images)` changed
        something: the dict of the COCO file, the folder of the images."""
        folder = self.folder / "data"
        shutil.copytree(self.source / "images", folder / "images")
        content = json.loads((self.source / "few.json").read_text())
        changed = change(content, folder / "images")
        text = changed if isinstance(changed, str) else json.dumps(content)
        (folder / "few.json").write_text(text)
        return f"few={folder / 'few.json'},{folder / 'images'}"

    def with_data(self, change, *more):
        """Outcome of a training on changed data."""
        return self.command(*more, data=self.data(copy.deepcopy(change)))

    def brief(self, text):
        """One line without the names of folders, times and sizes of this machine."""
        text = " ".join(str(text).split())
        for folder in (self.folder, self.source, Path(self.weights).parent, ROOT):
            text = text.replace(f"{folder}/", "").replace(str(folder), ".")
        text = re.sub(r"process \d+ on [\w.-]+", "process N on HOST", text)
        return re.sub(r"\d+ MiB", "N MiB", text)
