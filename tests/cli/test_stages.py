"""Evaluation after each stage, against a model whose stages are known to be blind or perfect."""

import json

import pytest
import torch

from d2ext.data import get_dataset_records, parse_register, register_coco_dataset

from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances


class KnownModel:
    """First stage: nothing. Second: boxes right, masks empty. Third: the ground truth."""

    def __init__(self, records):
        self._records = {r["image_id"]: r for r in records}

    def inference_stages(self, batched_inputs):
        stages = [[], [], []]
        for x in batched_inputs:
            record = self._records[x["image_id"]]
            size = record["height"], record["width"]
            annotations = [a for a in record["annotations"] if not a.get("iscrowd")]
            truth = annotations_to_instances(annotations, size, mask_format="bitmask")
            full = Instances(
                size,
                pred_boxes=truth.gt_boxes,
                pred_classes=truth.gt_classes,
                pred_masks=truth.gt_masks.tensor,
                scores=torch.full((len(truth),), 0.9),
            )
            blank = full[:]
            blank.pred_masks = torch.zeros_like(full.pred_masks)
            for outputs, instances in zip(stages, (full[:0], blank, full)):
                outputs.append({"instances": instances})
        return stages


def test_each_stage_gets_its_own_numbers(script, register_few):
    register_coco_dataset(*parse_register(register_few))
    records = get_dataset_records("demo_few")
    results = script.evaluate_stages(KnownModel(records), [[r] for r in records], "demo_few")
    assert [round(r["bbox/AP"], 3) for r in results] == [0, 100, 100]
    assert [round(r["segm/AP"], 3) for r in results] == [0, 0, 100]
    assert results[2]["segm/AP50"] == pytest.approx(100)


def test_command_prints_a_table_and_writes_the_same_numbers(
    script, htc_weights, register_few, tmp_path, capsys
):
    status = script.main(
        ["--config-file", "projects/HTC/configs/htc_tiny.py", "--weights", htc_weights]
        + ["--register", register_few, "--output", str(tmp_path / "new/stages.json")]
        + ["DATASETS.TEST=demo_few", "model.backbone.norm=GN"]
    )
    assert status == 0
    (stages,) = json.loads((tmp_path / "new/stages.json").read_text()).values()
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    for row, stage in zip(rows, stages):
        assert float(row.split()[1]) == pytest.approx(stage["bbox/AP"], abs=0.051)


def test_model_without_stages_is_an_error(script, mask_rcnn_weights, capsys):
    status = script.main(
        ["--config-file", "configs/mask_rcnn_tiny.yaml", "--weights", mask_rcnn_weights]
        + ["MODEL.RESNETS.NORM=GN"]
    )
    err = capsys.readouterr().err
    assert status == 1 and "GeneralizedRCNN" in err and len(err.splitlines()) == 1


def test_classes_in_another_order_and_under_other_names_are_refused(
    script, htc_weights, few_images, tmp_path, capsys
):
    data = json.loads((few_images / "few.json").read_text())
    for entry in data["categories"]:
        entry["id"] = 100 - entry["id"]
    for entry in data["annotations"]:
        entry["category_id"] = 100 - entry["category_id"]
    (tmp_path / "reversed.json").write_text(json.dumps(data))
    for entry in data["categories"]:
        entry["name"] += " 2"
    (tmp_path / "renamed.json").write_text(json.dumps(data))
    command = ["--config-file", "projects/HTC/configs/htc_tiny.py", "--weights", htc_weights]
    command += ["model.backbone.norm=GN", "model.proposal_generator.post_nms_topk=[10,2]"]

    def run(name, *more):
        register = f"stages_{name}={tmp_path / name}.json,{few_images / 'images'}"
        return script.main(
            [*command, "--register", register, f"DATASETS.TEST=stages_{name}", *more]
            + ["DATASETS.TRAIN=[]"]
        )

    assert run("reversed") == 1
    assert "was trained on classes in another order: number 0 is" in capsys.readouterr().err
    assert run("renamed") == 1
    assert "if these are the same classes, --rename-classes says so" in capsys.readouterr().err
    assert run("renamed", "--rename-classes") == 0
