"""Fixtures of the demo's tests: its scripts as modules, a few images, and untrained networks."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from d2ext.checkpoint import Checkpointer
from d2ext.config import load_projects
from d2ext.data import shapes
from d2ext.engine import build_experiment

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 4
# Group norm, because nothing is known about the statistics of random weights.
YAML_OPTIONS = ["MODEL.RESNETS.NORM=GN", "MODEL.WEIGHTS=none"]
LAZY_OPTIONS = ["model.backbone.norm=GN", "train.init_checkpoint=none"]


@pytest.fixture(scope="session", autouse=True)
def walkthrough_importable():
    """Scripts in demo/ import their package `walkthrough` because it lies beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "demo")
        yield


@pytest.fixture(scope="session")
def script():
    """Imports a script of the repository by its path."""

    def load(path):
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """Folder of a generated data set of a few images, none of them empty."""
    folder = shapes.generate("val", str(tmp_path_factory.mktemp("datasets")), NUM_IMAGES + 1)
    path = os.path.join(folder, "annotations.json")
    with open(path) as f:
        data = json.load(f)
    annotated = {a["image_id"] for a in data["annotations"]}
    data["images"] = [i for i in data["images"] if i["id"] in annotated][:NUM_IMAGES]
    kept = {i["id"] for i in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    assert len(kept) == NUM_IMAGES
    with open(os.path.join(folder, "few.json"), "w") as f:
        json.dump(data, f)
    return Path(folder)


@pytest.fixture(scope="session")
def register_few(few_images):
    """The same data set as a `--register` text."""
    return f"demo_few={few_images / 'few.json'},{few_images / 'images'}"


def save_random_weights(config, options, path):
    """A checkpoint as training would leave it, with class names and random weights."""
    load_projects()
    torch.manual_seed(0)
    experiment = build_experiment(str(ROOT / config), options)
    folder, name = os.path.split(path)
    checkpointer = Checkpointer(experiment.build_model(), folder, metadata=experiment.metadata())
    checkpointer.save(name.removesuffix(".pth"))
    return path


@pytest.fixture(scope="session")
def mask_rcnn_weights(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("mask_rcnn") / "weights.pth")
    return save_random_weights("configs/mask_rcnn_tiny.yaml", YAML_OPTIONS, path)


@pytest.fixture(scope="session")
def htc_weights(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("htc") / "weights.pth")
    return save_random_weights("projects/HTC/configs/htc_tiny.py", LAZY_OPTIONS, path)
