"""Several CPU processes under torchrun compute what one process does with the same total batch.

Our networks average over the regions of all processes. detectron2's Mask R-CNN and Cascade average
the means of the processes, so that their losses differ where one has fewer regions; here they have
the parts of `d2ext.modeling.baselines`, which do as ours.

All in double precision: sums over one image and over four round differently, and where two regions
are equally good a rounding error of single precision chooses another one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.soak.conftest import FULL

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, SEED = 5, 15
CONFIGS = {
    "htc": "projects/HTC/configs/htc_tiny.yaml",
    "fcis": "projects/FCIS/configs/fcis_tiny.yaml",
    "mnc": "projects/MNC/configs/mnc_tiny.yaml",
    "mask_rcnn": "configs/mask_rcnn_tiny.yaml",
    "cascade": "configs/cascade_mask_rcnn_tiny.yaml",
    "convnext": "configs/mask_rcnn_tiny_convnext.yaml",
}
LOSSES = {
    "htc": {"loss_mask_stage2", "loss_semantic_seg"},
    "mask_rcnn": {"loss_mask", "loss_box_reg"},
    "convnext": {"loss_mask", "loss_box_reg"},
    "cascade": {"loss_mask", "loss_box_reg_stage2"},
}
REPRODUCIBLE = [
    "MODEL.META_ARCHITECTURE=ReproducibleRCNN",
    "MODEL.PROPOSAL_GENERATOR.NAME=ReproducibleRPN",
]
MORE = {
    "mask_rcnn": [*REPRODUCIBLE, "MODEL.ROI_HEADS.NAME=ReproducibleROIHeads"],
    "cascade": [*REPRODUCIBLE, "MODEL.ROI_HEADS.NAME=ReproducibleCascadeROIHeads"],
    # Drop path leaves out other blocks in each process.
    "convnext": [
        *REPRODUCIBLE,
        "MODEL.ROI_HEADS.NAME=ReproducibleROIHeads",
        "MODEL.TIMM.DROP_PATH=0",
    ],
}


@pytest.fixture
def sparse_data(shapes_root, tmp_path):
    """COCO file with images of one size, most of them empty; returns its --register argument."""
    source = Path(shapes_root) / "shapes/train"
    data = json.loads((source / "annotations.json").read_text())
    full = {a["image_id"] for a in data["annotations"] if not a["iscrowd"]}
    same = [i for i in data["images"] if (i["width"], i["height"]) == (160, 120)]
    with_objects = [i for i in same if i["id"] in full][:3]
    # The same pictures once more, under other names and without annotations.
    images = shutil.copytree(source / "images", tmp_path / "images")
    without = [
        {**i, "id": 1000 + n, "file_name": f"empty{n}.png"} for n, i in enumerate(with_objects * 2)
    ]
    for empty, original in zip(without, with_objects * 2):
        shutil.copy(images / original["file_name"], images / empty["file_name"])
    data["images"] = with_objects + without
    kept = {i["id"] for i in with_objects}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    (tmp_path / "sparse.json").write_text(json.dumps(data))
    return f"sparse={tmp_path / 'sparse.json'},{images}"


def shares_with_objects(processes):
    """For every iteration, of how many processes the image has objects."""
    from d2ext.data import GlobalBatchSampler

    shares = [
        iter(GlobalBatchSampler([0] * 9, processes, SEED, rank=rank, world_size=processes))
        for rank in range(processes)
    ]
    return [
        sum(index < 3 for share in shares for index, _ in next(share)) for _ in range(ITERATIONS)
    ]


def run(name, processes, batch, register, output, *more):
    """The public command line, in one process or under torchrun; losses by iteration."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        *launcher,
        str(ROOT / "tests/soak/train_in_double.py"),
        *("--config-file", str(ROOT / CONFIGS[name])),
        *("--register", register),
        f"train.output_dir={output}",
        f"train.max_iter={ITERATIONS}",
        "train.log_period=1",
        f"train.seed={SEED}",
        "train.init_checkpoint=''",
        "train.device=cpu",
        f"SOLVER.IMS_PER_BATCH={batch}",
        "DATASETS.TRAIN=sparse",
        "DATASETS.TEST=()",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS=false",
        "DATALOADER.ASPECT_RATIO_GROUPING=false",
        "MODEL.RESNETS.NORM=GN",
        # Convolutions round differently for one image and for two. Adam turns the rounding error of
        # a vanishing gradient into a full step, which says nothing about the code; so: plain SGD.
        "SOLVER.OPTIMIZER=SGD",
        "SOLVER.BASE_LR=0.002",
        "INPUT.MIN_SIZE_TRAIN=(96,)",
        *MORE.get(name, ()),
        *more,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = (Path(output) / "metrics.json").read_text().splitlines()
    return {r["iteration"]: r for r in map(json.loads, lines)}


@pytest.mark.parametrize("name", CONFIGS if FULL else ["htc", "cascade", "convnext"])
@pytest.mark.parametrize("processes", [2, 4] if FULL else [2])
def test_processes_give_the_losses_of_one_also_with_empty_images(
    sparse_data, tmp_path, counted, name, processes
):
    """One image per process, so that an empty one is all that a process has."""
    assert {0, 1} <= set(shares_with_objects(processes)), "choose a SEED with empty batches"
    one = run(name, 1, processes, sparse_data, tmp_path / "one")
    several = run(name, processes, processes, sparse_data, tmp_path / "several")
    assert set(one) == set(several) == set(range(ITERATIONS))
    names = [name for name in one[0] if "loss" in name]
    assert len(names) > 4 and LOSSES.get(name, set()) <= set(names)
    differences = [max(abs(several[i][n] - one[i][n]) for n in names) for i in range(ITERATIONS)]
    # The second iteration has the weights after a step by the gradients of all processes.
    assert max(differences) <= 1e-4, differences
    counted(
        {
            "network": name,
            "processes": processes,
            "losses compared": len(names) * ITERATIONS,
            "largest difference": f"{max(differences):.1e}",
        }
    )


@pytest.mark.skipif(not FULL, reason="a minute; part of make soak")
def test_processes_with_parts_and_an_average_give_the_losses_and_weights_of_one(
    sparse_data, tmp_path
):
    """Two processes with one image in each of two parts, one of them frozen."""
    more = ["SOLVER.EMA_DECAY=0.5", "SOLVER.FREEZE=['backbone.bottom_up.stem.*']"]
    one = run("htc", 1, 4, sparse_data, tmp_path / "one", *more)
    parts = "SOLVER.ACCUMULATION_STEPS=2"
    several = run("htc", 2, 4, sparse_data, tmp_path / "several", *more, parts)
    for loss in (name for name in one[0] if "loss" in name):
        for iteration in range(ITERATIONS):
            near = pytest.approx(one[iteration][loss], abs=1e-5)
            assert several[iteration][loss] == near, (iteration, loss)
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("one", "several")
    )
    assert first["ema"]["steps"] == second["ema"]["steps"] == ITERATIONS
    assert first["model"].keys() == second["model"].keys()
    moved = max(
        float((first["model"][key] - value).abs().max())
        for key, value in first["ema"]["trained"].items()
    )
    for kind in (lambda x: x["model"], lambda x: x["ema"]["trained"]):
        torch.testing.assert_close(kind(second), kind(first), rtol=0, atol=moved / 1000)
