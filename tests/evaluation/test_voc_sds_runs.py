"""MNC and FCIS from a miniature VOC SDS folder to mAP^r, through their public command lines."""

import json
import math
from pathlib import Path

import pytest

from d2ext.data.voc_sds.example import make_example

ROOT = Path(__file__).resolve().parents[2]


def overrides(output, area):
    """Two iterations on small images; both kinds of config take these names."""
    return [
        "DATASETS.TRAIN=voc_sds_train",
        "DATASETS.TEST=voc_sds_val",
        "SOLVER.MAX_ITER=2",
        "SOLVER.IMS_PER_BATCH=2",
        "LOG_PERIOD=1",
        "MODEL.DEVICE=cpu",
        "TEST.METRICS=[coco,boundary]",
        "TEST.MAPR_IOUS=[0.5,0.7,0.1]",
        f"TEST.MAPR_AREA={area}",
        f"OUTPUT_DIR={output}",
    ]


@pytest.mark.parametrize(
    "project, config, layout, area",
    [("MNC", "mnc_tiny.yaml", "mnc", True), ("FCIS", "fcis_tiny.py", "fcis", False)],
)
def test_a_miniature_trains_and_evaluates(run_python, tmp_path, project, config, layout, area):
    names = make_example(str(tmp_path / "data"), layout=layout, num_images=(4, 3))
    folder, output = ROOT / "projects" / project, tmp_path / "out"
    process = run_python(
        folder / "train_net.py",
        *("--config-file", folder / "configs" / config),
        *overrides(output, area),
        path=[folder],
        DETECTRON2_DATASETS=str(tmp_path / "data"),
    )
    assert process.returncode == 0, process.stderr[-3000:] + process.stdout[-3000:]

    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    results = {k: v for line in lines for k, v in line.items() if "/" in k}
    assert all(f"{task}/AP" in results for task in ("bbox", "segm", "boundary"))
    metric = "voc_sds/mAPr_area" if area else "voc_sds/mAPr"
    for name in ("@0.1", "@0.5", "@0.7", "_vol"):
        assert 0 <= results[metric + name] <= 100
    assert results[f"{metric}@0.1"] >= results[f"{metric}@0.5"]

    inference = output / "inference" / "voc_sds_val"
    by_class = json.loads((inference / "voc_sds_by_class.json").read_text())
    assert len(by_class) == 21 and by_class["all"]["0.5"] == results[f"{metric}@0.5"]
    known = {int(name.replace("_", "")) for name in names["val"]}
    found = json.loads((inference / "coco_instances_results.json").read_text())
    assert found and {entry["image_id"] for entry in found} <= known
    assert {tuple(entry["segmentation"]["size"]) for entry in found} == {(72, 96)}
