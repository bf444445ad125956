"""`d2ext predict`: which images it takes, what it writes, and how it reports what it cannot."""

import json
import os
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from d2ext.checkpoint import Checkpointer
from d2ext.engine import build_experiment
from d2ext.engine.provenance import config_to_store
from d2ext.errors import UserError

from detectron2.structures import Boxes, Instances

MASK_RCNN = [
    "--config-file",
    "configs/mask_rcnn_tiny.yaml",
    "MODEL.RESNETS.NORM=GN",
    "MODEL.RPN.POST_NMS_TOPK_TEST=5",
]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_folders_and_patterns_stand_for_images_in_order(script, tmp_path):
    touch(tmp_path, "b.png", "d/2.JPG", "d/1.jpg", "d/notes.txt", "e/x.jpg", "e/y.jpg")
    inputs = [str(tmp_path / x) for x in ("b.png", "d", "e/*.jpg", "b.png")]
    expected = ["b.png", "d/1.jpg", "d/2.JPG", "e/x.jpg", "e/y.jpg"]
    assert script.expand_inputs(inputs) == [str(tmp_path / x) for x in expected]


def test_file_whose_name_looks_like_a_pattern_is_taken_literally(script, tmp_path):
    touch(tmp_path, "a[1].png")
    assert script.expand_inputs([str(tmp_path / "a[1].png")]) == [str(tmp_path / "a[1].png")]


@pytest.mark.parametrize("name", ["absent.jpg", "*.jpg", "."])
def test_input_that_stands_for_nothing_is_an_error(script, tmp_path, name):
    with pytest.raises(UserError, match="--input .*(no such image|no images)"):
        script.expand_inputs([str(tmp_path / name)])


def test_a_threshold_in_percent_is_one_line(script, tmp_path, capsys):
    command = ["--config-file", "none.yaml", "--input", str(tmp_path), "--output", str(tmp_path)]
    assert script.main([*command, "--confidence-threshold", "50"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: --confidence-threshold is 50") and "did you mean 0.5" in err


def test_images_of_one_name_get_pictures_of_different_names(script):
    stems = script.name_outputs(["a/x.jpg", "b/x.jpg", "x_2.png", "x.png"], "out")
    assert stems == ["out/x", "out/x_2", "out/x_2_2", "out/x_3"]


def test_pictures_never_replace_the_images(script, tmp_path):
    touch(tmp_path, "x.png")
    with pytest.raises(UserError, match="would overwrite"):
        script.name_outputs([str(tmp_path / "x.png")], str(tmp_path))


def test_exif_orientation_is_respected(script, tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15, 0] = 200  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    bgr = script.read_bgr(str(tmp_path / "turned.png"))
    assert bgr.shape == (30, 20, 3)
    assert (bgr[:15, :, 2] == 200).all() and (bgr[15:] == 0).all()


def test_grey_and_transparent_images_become_three_channels(script, tmp_path):
    Image.new("L", (8, 6), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 6), (1, 2, 3, 4)).save(tmp_path / "clear.png")
    assert (script.read_bgr(str(tmp_path / "grey.png")) == 7).all()
    assert (script.read_bgr(str(tmp_path / "clear.png")) == (3, 2, 1)).all()


@pytest.fixture
def instances():
    found = Instances((10, 20))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 1.0, 12.0, 5.0], [0.0, 0.0, 3.0, 3.0]]))
    found.scores = torch.tensor([0.75, 0.9])
    found.pred_classes = torch.tensor([1, 0])
    found.pred_masks = torch.zeros(2, 10, 20, dtype=torch.bool)
    found.pred_masks[0, 1:5, 2:12] = True
    return found


def test_table_lists_the_best_first_with_names_boxes_and_areas(script, instances):
    lines = script.found_table(instances, ["disk", "ring"]).splitlines()
    assert lines[2].split() == "disk 0.900 0 0 3 3 0".split()
    assert lines[3].split() == "ring 0.750 2 1 12 5 40".split()


def test_long_table_is_cut_and_says_so(script, instances):
    many = Instances.cat([instances] * 20)
    lines = script.found_table(many, ["disk", "ring"]).splitlines()
    assert len(lines) == 2 + 25 + 1 and lines[-1] == "... and 15 more"


def test_results_are_coco_results_with_file_and_class_name(script, instances):
    first = script.coco_results(instances, 7, "a/b.jpg", ["disk", "ring"])[0]
    assert first["file_name"] == "a/b.jpg" and first["category"] == "ring"
    assert first["image_id"] == 7 and first["category_id"] == 1
    assert first["bbox"] == [2, 1, 10, 4] and first["score"] == 0.75
    mask = mask_util.decode(first["segmentation"])
    np.testing.assert_array_equal(mask, instances.pred_masks[0].numpy())


def test_scores_of_masks_are_in_the_table_and_in_the_results(script, instances):
    instances.mask_scores = torch.tensor([0.5, 0.25])
    lines = script.found_table(instances, ["disk", "ring"]).splitlines()
    assert lines[0].endswith("mask score")
    assert [line.split()[-1] for line in lines[2:]] == ["0.250", "0.500"]
    results = script.coco_results(instances, 7, "a/b.jpg", ["disk", "ring"])
    assert [r["mask_score"] for r in results] == [0.5, 0.25]


def test_pictures_and_predictions_are_written_for_readable_images_and_others_named(
    script, mask_rcnn_weights, few_images, tmp_path, capsys
):
    good = sorted((few_images / "images").iterdir())[0]
    shutil.copy(good, tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("not an image")
    status = script.main(
        [*MASK_RCNN, "--weights", mask_rcnn_weights, "--output", str(tmp_path / "out")]
        + ["--confidence-threshold", "0.01", "--input", str(tmp_path)]
    )
    out, err = capsys.readouterr()
    assert status == 1
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "broken.png" in errors[0] and "text.jpg" in errors[1]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"good.png", "predictions.json"}
    with Image.open(tmp_path / "good.png") as image, Image.open(tmp_path / "out/good.png") as drawn:
        assert drawn.width >= 3 * image.width
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert results and {r["file_name"] for r in results} == {str(tmp_path / "good.png")}
    assert "1 of 3 images" in out


@pytest.fixture
def weights_with_config(mask_rcnn_weights, tmp_path):
    """Function: more metadata -> path of a checkpoint as a training leaves it."""

    def save(**metadata):
        overrides = [*MASK_RCNN[2:], "MODEL.DEVICE=cpu"]
        experiment = build_experiment(MASK_RCNN[1], overrides, with_data=False)
        experiment.set_num_classes(8)
        checkpointer = Checkpointer(
            experiment.build_model(),
            str(tmp_path / "run"),
            metadata={"config": config_to_store(experiment), **metadata},
        )
        checkpointer.load(mask_rcnn_weights)
        checkpointer.save("model")
        return str(tmp_path / "run/model.pth")

    return save


def test_weights_alone_are_enough(
    script, weights_with_config, few_images, tmp_path, monkeypatch, capsys
):
    image = str(sorted((few_images / "images").iterdir())[0])
    weights = weights_with_config(thing_classes=[f"kind {i}" for i in range(8)])
    command = ["--weights", weights, "--confidence-threshold", "0.01", "--input", image]
    command += ["--output", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)
    assert script.main(command) == 0
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert results and {r["category"] for r in results} <= {f"kind {i}" for i in range(8)}
    assert script.main([*command, "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.99"]) == 0
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == []


def test_neither_weights_nor_config_is_an_error(script, few_images, capsys):
    assert script.main(["--input", str(few_images / "images"), "--output", "unused"]) == 1
    assert capsys.readouterr().err == (
        "error: nothing to predict with: give --weights, --config-file or both\n"
    )


def test_another_config_than_the_training_s_is_refused_with_the_setting(
    script, weights_with_config, few_images, tmp_path, capsys
):
    own = tmp_path / "own.yaml"
    base = os.path.abspath(MASK_RCNN[1])
    own.write_text(f"_BASE_: {base}\nMODEL:\n  PIXEL_STD: [50.0, 50.0, 50.0]\n")
    command = ["--config-file", str(own), "--weights", weights_with_config(), "--output", "unused"]
    command += ["--input", str(few_images / "images"), *MASK_RCNN[2:]]
    assert script.main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "MODEL.PIXEL_STD was [1.0, 1.0, 1.0] and is [50.0, 50.0, 50.0]" in line


def test_data_sets_that_have_gone_are_no_matter(
    script, mask_rcnn_weights, few_images, tmp_path, capsys
):
    own = tmp_path / "own.yaml"
    base = os.path.abspath(MASK_RCNN[1])
    data = "{REGISTER: ['gone_demo=gone.json,gone'], TRAIN: [gone_demo], TEST: [gone_demo]}"
    own.write_text(f"_BASE_: {base}\nDATASETS: {data}\n")
    command = ["--config-file", str(own), "--weights", mask_rcnn_weights, *MASK_RCNN[2:]]
    command += ["--input", str(few_images / "images"), "--output", str(tmp_path / "out")]
    assert script.main(command) == 0


def test_stages_are_drawn_and_the_last_one_is_the_result(
    script, htc_weights, few_images, tmp_path, capsys
):
    image = sorted((few_images / "images").iterdir())[0]
    command = ["--config-file", "projects/HTC/configs/htc_tiny.py", "--weights", htc_weights]
    command += ["--confidence-threshold", "0.05", "--device", "cpu"]
    # Overrides may follow the images directly.
    command += ["--input", str(image), "model.backbone.norm=GN"]
    assert script.main([*command, "--stages", "--output", str(tmp_path / "a")]) == 0
    assert script.main([*command, "--output", str(tmp_path / "b")]) == 0
    assert "1 of 1 images" in capsys.readouterr().out
    assert (tmp_path / f"a/{image.stem}_stages.png").is_file()
    staged, plain = (
        json.loads((tmp_path / x / "predictions.json").read_text()) for x in ("a", "b")
    )
    assert staged and staged == plain


def test_stages_of_a_model_without_stages_are_an_error(
    script, mask_rcnn_weights, few_images, capsys
):
    status = script.main(
        [*MASK_RCNN, "--weights", mask_rcnn_weights, "--output", "unused", "--stages"]
        + ["--input", str(few_images / "images")]
    )
    err = capsys.readouterr().err
    assert status == 1 and err.startswith("error: --stages: GeneralizedRCNN")
    assert len(err.splitlines()) == 1
