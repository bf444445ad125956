"""Pictures of instances: what is painted, what is left alone, and what is refused."""

import tracemalloc

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from d2ext.errors import UserError
from d2ext.visualization import (
    display_scale,
    draw_ground_truth,
    draw_predictions,
    draw_semantic,
    draw_stages,
    draw_training_input,
    overlay,
    training_image,
)

from detectron2.data import Metadata
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks

METADATA = Metadata(thing_classes=["disk", "ring"])
GREY = np.full((40, 60, 3), 128, np.uint8)


def make_instances(boxes, classes, scores, size=(40, 60)):
    """Instances whose masks fill their (whole-pixel) boxes."""
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores)
    instances.pred_masks = torch.zeros((len(classes), *size), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(instances.pred_masks, boxes):
        mask[y0:y1, x0:x1] = True
    return instances


ONE = make_instances([[10, 20, 30, 36]], [0], [0.9])


def changed(picture, scale):
    """Which pixels of the picture differ from the grey image, as bool (H, W)."""
    assert picture.shape == (40 * scale, 60 * scale, 3) and picture.dtype == np.uint8
    return (picture != 128).any(axis=2)


def test_small_image_is_enlarged_by_a_whole_number_and_large_one_is_not():
    assert display_scale(128, 128) == 4
    assert display_scale(8, 8) == 8
    assert display_scale(800, 1333) == 1
    height, width = draw_predictions(GREY, ONE, METADATA).shape[:2]
    assert (height, width) == (320, 480)


def test_mask_is_tinted_and_what_is_far_from_it_stays():
    touched = changed(draw_predictions(GREY, ONE, METADATA, scale=8), 8)
    assert touched[20 * 8 : 36 * 8, 10 * 8 : 30 * 8].all()
    assert not touched[:, 45 * 8 :].any()
    assert not touched[38 * 8 :].any()


def test_hole_of_a_mask_is_not_painted():
    instances = make_instances([[10, 4, 40, 36]], [1], [0.9])
    instances.pred_masks[0, 12:28, 18:32] = False
    touched = changed(draw_predictions(GREY, instances, METADATA, scale=4), 4)
    assert not touched[14 * 4 : 26 * 4, 20 * 4 : 30 * 4].any()
    assert touched[6 * 4 : 10 * 4, 12 * 4 : 38 * 4].all()


def test_scores_below_the_threshold_are_not_drawn():
    both = make_instances([[10, 20, 30, 36], [40, 5, 55, 15]], [0, 1], [0.9, 0.4])
    expected = draw_predictions(GREY, ONE, METADATA)
    np.testing.assert_array_equal(draw_predictions(GREY, both, METADATA, 0.5), expected)
    assert (draw_predictions(GREY, both, METADATA, 0.3) != expected).any()


def test_label_says_class_name_and_score(monkeypatch):
    said = []
    monkeypatch.setattr(
        overlay, "draw_label", lambda canvas, text, *args, **kwargs: said.append(text)
    )
    both = make_instances([[10, 20, 30, 36], [40, 5, 55, 15]], [0, 1], [0.904, 0.6])
    draw_predictions(GREY, both, METADATA)
    assert sorted(said) == ["disk 90%", "ring 60%"]


def test_same_instances_give_the_same_picture():
    first, second = (draw_predictions(GREY, ONE, METADATA) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_image_is_not_modified_and_may_be_a_reversed_view():
    image = GREY.copy()
    picture = draw_predictions(image[:, :, ::-1], ONE, METADATA, scale=1)
    np.testing.assert_array_equal(image, GREY)
    assert picture.shape == GREY.shape


def test_instances_without_masks_are_drawn_as_boxes():
    boxes_only = ONE[:]
    boxes_only.remove("pred_masks")
    touched = changed(draw_predictions(GREY, boxes_only, METADATA, scale=8), 8)
    assert touched[26 * 8, 10 * 8] and touched[26 * 8, 30 * 8]
    assert not touched[26 * 8 : 32 * 8, 14 * 8 : 26 * 8].any()


def test_no_instances_leave_the_image_as_it_is():
    assert not changed(draw_predictions(GREY, ONE[:0], METADATA, scale=2), 2).any()


def test_colors_differ_between_classes_and_between_instances_of_one_class():
    colors = overlay.instance_colors([0, 0, 1, 0, 19, 1])
    assert len(set(colors)) == 6
    assert colors[2] == overlay.instance_colors([1])[0]


def test_class_without_a_name_is_an_error_and_not_a_number():
    third = make_instances([[10, 20, 30, 36]], [2], [0.9])
    with pytest.raises(UserError, match="class 2 has no name"):
        draw_predictions(GREY, third, METADATA)


def test_name_that_looks_like_a_formula_can_be_drawn():
    draw_predictions(GREY, ONE, Metadata(thing_classes=["$\\frac{$ 10_a $b$"]))


def test_instances_of_another_image_size_are_refused():
    with pytest.raises(UserError, match=r"\(40, 60\).*\(20, 60\)"):
        draw_predictions(GREY, make_instances([], [], [], (20, 60)), METADATA)


@pytest.fixture
def record():
    return {
        "height": 40,
        "width": 60,
        "annotations": [
            {
                "bbox": [10, 20, 20, 16],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [[10, 20, 30, 20, 30, 36, 10, 36]],
            }
        ],
    }


def test_ground_truth_is_read_from_the_file_and_painted_where_it_is(record, tmp_path):
    record["file_name"] = str(tmp_path / "grey.png")
    Image.fromarray(GREY).save(record["file_name"])
    touched = changed(draw_ground_truth(record, METADATA, scale=8), 8)
    assert touched[20 * 8 : 36 * 8, 10 * 8 : 30 * 8].all()
    assert not touched[:, 45 * 8 :].any()


def test_polygon_and_run_length_masks_look_the_same(record):
    picture = draw_ground_truth(record, METADATA, GREY)
    mask = np.zeros((40, 60), np.uint8)
    mask[20:36, 10:30] = 1
    record["annotations"][0]["segmentation"] = mask_util.encode(np.asfortranarray(mask))
    np.testing.assert_array_equal(draw_ground_truth(record, METADATA, GREY), picture)


def test_crowd_region_is_marked_as_such(record, monkeypatch):
    said = []
    monkeypatch.setattr(
        overlay, "draw_label", lambda canvas, text, *args, **kwargs: said.append(text)
    )
    record["annotations"][0]["iscrowd"] = 1
    draw_ground_truth(record, METADATA, GREY)
    assert said == ["disk (crowd)"]


def test_record_without_annotations_shows_the_plain_image(record):
    record["annotations"] = []
    assert not changed(draw_ground_truth(record, METADATA, GREY, scale=2), 2).any()


def test_unreadable_image_of_a_record_is_named(record, tmp_path):
    record["file_name"] = str(tmp_path / "absent.png")
    with pytest.raises(UserError, match=r"cannot read image .*absent\.png"):
        draw_ground_truth(record, METADATA)


def test_stages_are_panels_in_order():
    picture = draw_stages(GREY, [ONE[:0], ONE], METADATA, scale=4)
    plain = draw_predictions(GREY, ONE[:0], METADATA, scale=4)
    drawn = draw_predictions(GREY, ONE, METADATA, scale=4)
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    assert contains(left, plain) and not contains(left, drawn)
    assert contains(right, drawn) and not contains(right, plain)


def contains(sheet, panel):
    height, width = panel.shape[:2]
    return any(
        np.array_equal(sheet[y : y + height, x : x + width], panel)
        for y in range(sheet.shape[0] - height + 1)
        for x in range(sheet.shape[1] - width + 1)
        if (sheet[y, x] == panel[0, 0]).all()
    )


def test_mask_without_pixels_is_drawn_as_its_box():
    empty = ONE[:]
    empty.pred_masks = torch.zeros_like(ONE.pred_masks)
    boxes_only = ONE[:]
    boxes_only.remove("pred_masks")
    np.testing.assert_array_equal(
        draw_predictions(GREY, empty, METADATA), draw_predictions(GREY, boxes_only, METADATA)
    )


def make_sample(mask_format="bitmask"):
    """What a training loader gives of a grey image with one disk, boxes in whole pixels."""
    instances = Instances((40, 60))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 20, 30, 36]]))
    instances.gt_classes = torch.tensor([0])
    if mask_format == "bitmask":
        instances.gt_masks = BitMasks(ONE.pred_masks)
    else:
        instances.gt_masks = PolygonMasks([[np.array([10.0, 20, 30, 20, 30, 36, 10, 36])]])
    return {"image": torch.full((3, 40, 60), 128, dtype=torch.uint8), "instances": instances}


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_training_input_has_the_colours_of_predictions(mask_format):
    drawn = draw_training_input(make_sample(mask_format), METADATA, scale=4)
    predicted = draw_predictions(GREY, ONE, METADATA, scale=4)
    inside = np.s_[22 * 4 : 34 * 4, 12 * 4 : 28 * 4]
    np.testing.assert_array_equal(drawn[inside], predicted[inside])


def test_channels_of_a_training_image_are_put_in_order():
    sample = make_sample()
    sample["image"][0] = 7
    assert (training_image(sample, "BGR") == [128, 128, 7]).all()
    assert (training_image(sample, "RGB") == [7, 128, 128]).all()


def test_semantic_labels_have_the_hue_of_their_class_and_ignored_pixels_none():
    labels = np.full((40, 60), 255)
    labels[:, :30] = 1
    touched = draw_semantic(GREY, labels, ["disk", "ring"], scale=8).astype(int)
    assert (touched[:, 32 * 8 :] == 128).all()
    tint = touched[38 * 8, 4 * 8] - 128 * 0.3
    expected = 0.7 * 255 * np.array(overlay.instance_colors([1])[0])
    assert np.abs(tint - expected).max() < 12


def test_a_photograph_is_drawn_in_little_more_memory_than_its_copy():
    photo = np.zeros((1500, 2000, 3), np.uint8)
    instances = make_instances([[100, 200, 400, 500]], [0], [0.9], photo.shape[:2])
    tracemalloc.start()
    try:
        draw_predictions(photo, instances, METADATA, scale=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * photo.nbytes


def test_boxes_beyond_the_picture_are_cut_at_its_border():
    beyond = make_instances([[10, 20, 30, 36]], [0], [0.9])
    beyond.remove("pred_masks")
    beyond.pred_boxes = Boxes(torch.tensor([[-30.0, -20.0, 30.0, 80.0]]))
    touched = changed(draw_predictions(GREY, beyond, METADATA, scale=8), 8)
    assert touched[160, 30 * 8] and not touched[160, 32 * 8 :].any()
