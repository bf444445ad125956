"""Short runs of real configs on a few small images."""

from pathlib import Path

import pytest

from d2ext.engine import build_experiment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def configs():
    """Stems of the tiny configs; add `.yaml` or `.py`."""
    return {
        "mask_rcnn": ROOT / "configs/mask_rcnn_tiny",
        "htc": ROOT / "projects/HTC/configs/htc_tiny",
    }


def short_overrides(name, kind, output_dir, dataset):
    """Few, small images and random weights, in either kind of config."""
    common = [
        f"train.output_dir={output_dir}",
        "train.init_checkpoint=''",
        "train.max_iter=6",
        "train.log_period=1",
        "train.checkpointer.period=2",
        "SOLVER.IMS_PER_BATCH=2",
        f"DATASETS.TRAIN={dataset}",
        "train.device=cpu",
    ]
    own = {
        "yaml": ["MODEL.RESNETS.NORM=GN", "INPUT.MIN_SIZE_TRAIN=(64,)", "DATASETS.TEST=()"],
        "py": [
            "model.backbone.norm=GN",
            "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
            "dataloader.test.dataset=[]",
        ],
    }
    return common + own[kind]


@pytest.fixture
def short_run(configs, shapes_few, tmp_path):
    """Make an experiment: `short_run("htc", "yaml", "folder", "more=overrides")`."""

    def make(name, kind, folder, *more):
        overrides = short_overrides(name, kind, tmp_path / folder, shapes_few)
        return build_experiment(f"{configs[name]}.{kind}", overrides + list(more))

    return make
