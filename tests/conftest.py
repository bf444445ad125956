"""Fixtures of all tests: d2ext before detectron2, one thread, generated data, fixed seeds."""

import importlib
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# detectron2 reads the folder of the data sets when it is imported, so it is set here.
_DATASETS = tempfile.TemporaryDirectory(prefix="d2ext-test-datasets-")
os.environ["DETECTRON2_DATASETS"] = _DATASETS.name

import d2ext  # noqa: E402, F401, I001  adapts detectron2; has to come before it
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 27  # of split "train": image 6 is empty, image 27 holds a crowd region
SCRIPTS = ("tools", "dev", "demo")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same state of the three global generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def catalogs():
    """detectron2's catalogs are global: undo what a test registers or removes."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    datasets, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    for catalog, saved in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
        catalog.data.clear()
        catalog.data.update(saved)


@pytest.fixture(autouse=True)
def log_handlers():
    """detectron2's loggers keep the stream they were set up with, which pytest replaces and closes
    after each test: undo what a test sets up."""
    loggers = [logging.getLogger(name) for name in ("", "detectron2", "fvcore", "d2ext")]
    saved = [(x, x.handlers[:], x.propagate, x.level) for x in loggers]
    yield
    for logger, handlers, propagate, level in saved:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    from detectron2.utils.logger import setup_logger

    getattr(setup_logger, "cache_clear", lambda: None)()


@pytest.fixture
def event_storage():
    """The storage that losses and samplers write to while a model trains."""
    from detectron2.utils.events import EventStorage

    with EventStorage() as storage:
        yield storage


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """Data set folder with the first images of one split."""
    from d2ext.data import shapes

    root = str(tmp_path_factory.mktemp("datasets"))
    shapes.generate("train", root, NUM_IMAGES)
    return root


@pytest.fixture
def shapes_few(shapes_root):
    """Name of a registered set of a few images."""
    from d2ext.data import register_shapes

    register_shapes("shapes_few", "train", shapes_root, NUM_IMAGES)
    return "shapes_few"


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """Run Python in a process of its own that sees this checkout.

    `run_python(*arguments, path=(), **environment)` gives the `CompletedProcess`; `path` are
    folders put before the checkout on the module search path, `timeout` seconds are allowed.
    """
    folder = tmp_path_factory.mktemp("process")

    def run(*arguments, path=(), cwd=folder, timeout=300, **environment):
        search = [*map(str, path), str(ROOT)]
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(search),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="module")
def script(request):
    """The script that a test file mirrors, as a module: `tests/tools/test_x.py` has `tools/x.py`,
    and `tests/cli/test_x.py` the command `d2ext.cli.x`.

    Files beside the script can be imported, as when Python runs it.
    """
    folder, file = request.path.relative_to(ROOT / "tests").parts
    if folder == "cli":
        yield importlib.import_module(f"d2ext.cli.{Path(file).stem.removeprefix('test_')}")
        return
    assert folder in SCRIPTS, f"{request.path} mirrors no script"
    path = ROOT / folder / file.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """Folder of a generated data set of four images, none of them empty."""
    from d2ext.data import shapes

    folder = Path(shapes.generate("val", str(tmp_path_factory.mktemp("datasets")), 5))
    data = json.loads((folder / "annotations.json").read_text())
    annotated = {a["image_id"] for a in data["annotations"]}
    data["images"] = [i for i in data["images"] if i["id"] in annotated][:4]
    kept = {i["id"] for i in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    assert len(kept) == 4
    (folder / "few.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="session")
def register_few(few_images):
    """The same data set as a `--register` text."""
    return f"demo_few={few_images / 'few.json'},{few_images / 'images'}"


def _save_random_weights(config, options, folder):
    """A checkpoint as training would leave it, with class names and random weights; its options ask
    for group norm, because nothing is known about the statistics of such weights."""
    from d2ext.checkpoint import Checkpointer
    from d2ext.config import load_projects
    from d2ext.engine import build_experiment

    load_projects()
    torch.manual_seed(0)
    experiment = build_experiment(str(ROOT / config), options)
    model, metadata = experiment.build_model(), experiment.metadata()
    Checkpointer(model, str(folder), metadata=metadata).save("weights")
    return str(folder / "weights.pth")


@pytest.fixture(scope="session")
def mask_rcnn_weights(tmp_path_factory):
    """Path of a checkpoint of an untrained `mask_rcnn_tiny.yaml` with group norm."""
    options = ["MODEL.RESNETS.NORM=GN", "MODEL.WEIGHTS=none"]
    folder = tmp_path_factory.mktemp("mask_rcnn")
    return _save_random_weights("configs/mask_rcnn_tiny.yaml", options, folder)


@pytest.fixture(scope="session")
def htc_weights(tmp_path_factory):
    """Path of a checkpoint of an untrained `htc_tiny.py` with group norm."""
    options = ["model.backbone.norm=GN", "train.init_checkpoint=none"]
    folder = tmp_path_factory.mktemp("htc")
    return _save_random_weights("projects/HTC/configs/htc_tiny.py", options, folder)


@pytest.fixture(scope="session")
def installed(tmp_path_factory, run_python):
    """Function: folder of a package -> folder for the module search path, into which pip has
    installed the package (from a copy, as it leaves files beside the sources)."""

    def install(folder):
        work = tmp_path_factory.mktemp("installed")
        left_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "output")
        shutil.copytree(folder, work / "source", ignore=left_out)
        pip = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
        process = run_python(*pip, "--target", work / "site", work / "source")
        assert process.returncode == 0, process.stdout + process.stderr
        return work / "site"

    return install


@pytest.fixture
def clean_python(tmp_path):
    """The Python of a new virtual environment that has the packages of this one (as links), but
    neither detectron2 nor d2ext."""
    venv.create(tmp_path / "clean", symlinks=True)
    (site,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    hidden = re.compile(r".*(detectron2|d2ext|__pycache__)|.*\.pth$")
    for folder in map(Path, sys.path):
        for path in folder.iterdir() if folder.name == "site-packages" else ():
            if not hidden.match(path.name) and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return tmp_path / "clean/bin/python"


_RUN_ALL = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command} ended with {end.code}")
"""


@pytest.fixture(scope="session")
def run_scripts(run_python):
    """Run scripts of this repository, `run_scripts([script, *arguments], ..., path=folders)`, one
    after the other in a process of their own, as `run_python`; the output of all."""

    def run(*commands, **options):
        commands = [[str(ROOT / script), *map(str, words)] for script, *words in commands]
        process = run_python("-W", "ignore", "-c", _RUN_ALL, json.dumps(commands), **options)
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return process.stdout

    return run


@pytest.fixture
def register_argument(shapes_root):
    """The `--register` argument of a set `few` of a few images."""
    folder = os.path.join(shapes_root, "shapes/train")
    return f"few={folder}/annotations.json,{folder}/images"
