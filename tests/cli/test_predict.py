"""`d2ext predict`: which images it takes, what it writes, and how it reports what it cannot."""

import json
import os
import shutil

import cv2
import numpy as np
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


def test_scores_of_masks_are_in_the_table(script, instances):
    instances.mask_scores = torch.tensor([0.5, 0.25])
    lines = script.found_table(instances, ["disk", "ring"]).splitlines()
    assert lines[0].endswith("mask score")
    assert [line.split()[-1] for line in lines[2:]] == ["0.250", "0.500"]


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


@pytest.mark.parametrize("options", [["--batch-size", "3", "--workers", "2"], ["--quiet"]])
def test_batches_and_loading_processes_change_nothing(
    script, mask_rcnn_weights, few_images, tmp_path, capsys, options
):
    command = [*MASK_RCNN, "--weights", mask_rcnn_weights, "--confidence-threshold", "0.05"]
    command += ["--input", str(few_images / "images"), "--write", "results"]
    assert script.main([*command, "--output", str(tmp_path / "a")]) == 0
    lines = len(capsys.readouterr().out.splitlines())
    assert script.main([*command, "--output", str(tmp_path / "b"), *options]) == 0
    out = capsys.readouterr().out
    assert "images/s)" in out and (len(out.splitlines()) == 1) is ("--quiet" in options) < lines
    a, b = (json.loads((tmp_path / x / "predictions.json").read_text()) for x in "ab")
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        assert one["score"] == pytest.approx(other["score"], rel=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], rel=1e-5, abs=1e-4)
        assert one["file_name"] == other["file_name"] and one["category"] == other["category"]


def test_a_config_is_found_by_its_name_and_a_coco_file_gives_ids(
    script, mask_rcnn_weights, few_images, tmp_path, capsys
):
    command = ["--config-file", "mask_rcnn_tiny", *MASK_RCNN[2:], "--weights", mask_rcnn_weights]
    command += ["--input", str(few_images / "few.json"), "--confidence-threshold", "0.01"]
    command += ["--write", "coco", "--output", str(tmp_path), "--max-images", "3"]
    assert script.main(command) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    given = json.loads((few_images / "few.json").read_text())
    found = json.loads((tmp_path / "coco.json").read_text())
    names = [(i["id"], i["file_name"]) for i in given["images"]]
    assert [(i["id"], i["file_name"]) for i in found["images"]] == names[:3]
    assert {c["id"]: c["name"] for c in found["categories"]} == {
        c["id"]: c["name"] for c in given["categories"]
    }


def test_the_frames_of_a_video_become_a_video(script, mask_rcnn_weights, tmp_path, capsys):
    clip = str(tmp_path / "clip.mp4")
    video = cv2.VideoWriter(clip, cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (96, 64))
    for number in range(3):
        video.write(np.full((64, 96, 3), 60 * number, np.uint8))
    video.release()
    command = [*MASK_RCNN, "--weights", mask_rcnn_weights, "--input", clip, "--quiet"]
    assert script.main([*command, "--output", str(tmp_path / "out"), "--write", "video"]) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    made = cv2.VideoCapture(str(tmp_path / "out/predictions.mp4"))
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and made.get(cv2.CAP_PROP_FPS) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-images", "0"], "--max-images is 0"),
        (["--batch-size", "0"], "the batch size is 0"),
        (["--workers", "-1"], "-1 processes cannot read images"),
        (["--config-file", "mask_rcnn_tinny"], "nearest: mask_rcnn_tiny"),
    ],
)
def test_numbers_and_names_that_make_no_sense_are_one_line(
    script, mask_rcnn_weights, few_images, tmp_path, capsys, options, words
):
    command = [*MASK_RCNN, "--weights", mask_rcnn_weights, "--output", str(tmp_path)]
    assert script.main([*command, "--input", str(few_images / "images"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
