"""The tiny configs, what makes a run of them short, what it leaves behind, and interference."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Add `.yaml` or `.py`.
CONFIGS = {
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


def losses(output_dir):
    """Iteration -> total loss of a run; the last entry of an iteration counts."""
    lines = (Path(output_dir) / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["iteration"]: r["total_loss"] for r in records if "total_loss" in r}


def calling(experiment, calls):
    """Let the training loader of an experiment call functions before it yields a batch:
    `{number: function}`."""
    build = experiment.build_train_loader

    def build_calling(start_iter=0):
        for number, batch in enumerate(build(start_iter)):
            calls.get(number, lambda: None)()
            yield batch

    experiment.build_train_loader = build_calling
    return experiment
