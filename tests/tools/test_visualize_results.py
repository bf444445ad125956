"""tools/visualize_results.py: pictures of results, and mistakes are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2ext.data import get_dataset_records
from d2ext.visualization import draw_ground_truth, draw_predictions

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances


@pytest.fixture
def few(shapes_few):
    records = get_dataset_records(shapes_few)
    return records, MetadataCatalog.get(shapes_few)


def run(script, path, metadata, output, *more):
    command = ["--results", str(path), "--output-dir", str(output)]
    spec = f"results_few={metadata.json_file},{metadata.image_root}"
    return script.main([*command, "--register", spec, *more])


def test_pictures_show_ground_truth_left_and_predictions_right(script, few, tmp_path, capsys):
    records, metadata = few
    (tmp_path / "results.json").write_text("[]")
    assert run(script, tmp_path / "results.json", metadata, tmp_path, "--num-images", "2") == 0
    assert "2 pictures" in capsys.readouterr().out
    rgb = np.asarray(Image.open(records[0]["file_name"]))
    nothing = script.to_instances([], rgb.shape[:2], {})
    truth = draw_ground_truth(records[0], metadata)
    plain = draw_predictions(rgb, nothing, metadata)
    picture = np.asarray(Image.open(tmp_path / Path(records[0]["file_name"]).name))
    assert stands_in(picture, truth, right=False) and stands_in(picture, plain, right=True)
    assert not stands_in(picture, plain, right=False)


def stands_in(picture, panel, right):
    """Whether a panel stands in the lower left or right corner, with any margin."""
    height, width = panel.shape[:2]
    for margin in range(1, 40):
        row = picture.shape[0] - margin - height
        column = picture.shape[1] - margin - width if right else margin
        if np.array_equal(picture[row : row + height, column : column + width], panel):
            return True
    return False


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read"),
        ("[", "not valid JSON"),
        ("{}", "entry 0: COCO results are a list"),
        ('[{"image_id": 1}]', "entry 0: COCO results"),
        (
            '[{"image_id": 99999, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]',
            "belong to another data set",
        ),
        (
            '[{"image_id": 1, "category_id": 99, "bbox": [0, 0, 1, 1], "score": 1}]',
            "category 99, the data set has 1, 2",
        ),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1, '
            '"segmentation": {"size": [2, 2], "counts": "04"}}]',
            "masks of (2, 2)",
        ),
    ],
)
def test_unusable_results_are_one_line(script, few, tmp_path, capsys, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    assert run(script, path, few[1], tmp_path) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_threshold_in_percent_is_one_line(script, few, tmp_path, capsys):
    (tmp_path / "results.json").write_text("[]")
    more = ["--confidence-threshold", "50"]
    assert run(script, tmp_path / "results.json", few[1], tmp_path, *more) == 1
    assert "did you mean 0.5" in capsys.readouterr().err


def results_by_file(records, metadata):
    """What `d2ext predict` writes, of a detection with a box in each image."""
    return [
        {"image_id": 100 + n, "category_id": 0, "bbox": [1, 2, 30, 40], "score": 0.75,
         "file_name": record["file_name"], "category": metadata.thing_classes[n % 2]}
        for n, record in enumerate(records)
    ]  # fmt: skip


def test_predictions_of_the_demo_are_taken_by_file_and_class_name(script, few, tmp_path):
    records, metadata = few
    results = results_by_file(records, metadata)
    (tmp_path / "predictions.json").write_text(json.dumps(results))
    path = tmp_path / "predictions.json"
    assert run(script, path, metadata, tmp_path, "--num-images", "2") == 0
    rgb = np.asarray(Image.open(records[1]["file_name"]))
    instances = Instances(rgb.shape[:2], pred_boxes=Boxes(torch.tensor([[1.0, 2, 31, 42]])),
                          pred_classes=torch.tensor([1]), scores=torch.tensor([0.75]))  # fmt: skip
    picture = np.asarray(Image.open(tmp_path / Path(records[1]["file_name"]).name))
    assert stands_in(picture, draw_predictions(rgb, instances, metadata), right=True)


def test_images_of_one_name_have_pictures_of_their_own(script, tmp_path):
    data = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(tmp_path / folder / "x.png")
        image = {"id": number, "file_name": f"{folder}/x.png", "width": 8, "height": 8}
        data["images"].append(image)
    (tmp_path / "a.json").write_text(json.dumps(data))
    (tmp_path / "results.json").write_text("[]")
    out = tmp_path / "out"
    command = ["--results", str(tmp_path / "results.json"), "--output-dir", str(out)]
    assert script.main([*command, "--register", f"mine={tmp_path}/a.json,{tmp_path}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["x.png", "x_2.png"]
