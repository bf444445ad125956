"""Test-time augmentation: identity views change nothing, mirrored and resized views map back, and
results of several views are merged as documented."""

from pathlib import Path

import pytest
import torch
from fvcore.transforms import HFlipTransform, TransformList, VFlipTransform
from torch import nn

from d2ext.errors import UserError
from d2ext.modeling.test_time_augmentation import (
    MergedViewsTTA,
    merge_views,
    with_test_time_augmentation,
)
from d2ext.projects.htc import add_htc_config
from d2ext.utils.testing import tiny_config

from detectron2.data.transforms import ResizeTransform
from detectron2.modeling import build_model
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances

SIZE = (64, 96)
KINDS = {
    "mask_rcnn": {"ROI_HEADS.NAME": "StandardROIHeads"},
    "cascade": {"META_ARCHITECTURE": "ReproducibleRCNN", "ROI_HEADS.NAME": "PlainCascade"},
    "htc": {
        "META_ARCHITECTURE": "HybridTaskCascade",
        "ROI_HEADS.NAME": "HTCROIHeads",
        "HTC.SEMANTIC.CONV_DIM": 8,
        "HTC.SEMANTIC.NUM_CONV": 2,
    },
}


def make_model(kind, *more):
    """A tiny model with weights that detect things."""
    cfg = tiny_config(add_htc_config)
    settings = [(f"MODEL.{key}", value) for key, value in KINDS[kind].items()]
    cfg.merge_from_list([x for pair in settings for x in pair] + list(more))
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    for name, parameter in model.roi_heads.named_parameters():
        if "mask_head" in name and "predictor" in name:
            nn.init.normal_(parameter, std=3.0)
        elif any(word in name for word in ("cls_score", "bbox_pred", "bias")):
            nn.init.normal_(parameter, std=0.3)
    return model


def make_input(seed=0, size=SIZE, height=None, width=None):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height or size[0], "width": width or size[1]}


def assert_same(found, expected, atol=1e-3):
    assert found.image_size == expected.image_size
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert found.pred_classes.equal(expected.pred_classes)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=atol
    )
    assert expected.pred_masks.any() and not expected.pred_masks.all()
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", [SIZE, (128, 192)])
def test_views_equal_to_the_image_change_nothing(kind, output):
    model = make_model(kind)
    x = make_input(height=output[0], width=output[1])
    with torch.no_grad():
        expected = model([x])[0]["instances"]
    for sizes in ([64], [64, 64]):  # once and twice
        augmented = with_test_time_augmentation(model, min_sizes=sizes, max_size=96, flip=False)
        assert isinstance(augmented, GeneralizedRCNNWithTTA)
        assert_same(augmented([x])[0]["instances"], expected)
        general = MergedViewsTTA(model, DatasetMapperTTA(sizes, 96, False))
        assert_same(general([x])[0]["instances"], expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_averaged_over_sizes_and_mirror_images(kind):
    model = make_model(kind)
    augmented = with_test_time_augmentation(model, min_sizes=[48, 64], max_size=200)
    found = augmented([make_input(height=100, width=150)])[0]["instances"]
    assert 0 < len(found) <= 10 and found.image_size == (100, 150)
    assert found.pred_masks.shape == (len(found), 100, 150)
    assert model.roi_heads.mask_on  # switched off only while boxes were detected


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_with_mirroring_the_mirror_image_gives_the_mirrored_result(kind, general):
    model = make_model(kind)
    mapper = DatasetMapperTTA([64], 96, True)
    augmented = (
        MergedViewsTTA(model, mapper)
        if general
        else with_test_time_augmentation(model, min_sizes=[64], max_size=96)
    )
    x = make_input()
    found = augmented([x])[0]["instances"]
    mirrored = augmented([{**x, "image": x["image"].flip(-1)}])[0]["instances"]
    boxes = mirrored.pred_boxes.tensor
    mirrored.pred_boxes = Boxes(
        torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], 1)
    )
    mirrored.pred_masks = mirrored.pred_masks.flip(-1)
    assert_same(mirrored, found)


def test_images_without_detections_are_handled():
    for augment in (True, False):
        model = make_model("htc")
        model.roi_heads.box_predictor[-1].test_score_thresh = 1.1
        if augment:
            model = with_test_time_augmentation(model, min_sizes=[64, 48], max_size=200)
        else:
            model = MergedViewsTTA(model, DatasetMapperTTA([64, 48], 200, True))
        found = model([make_input()])[0]["instances"]
        assert len(found) == 0 and found.pred_masks.shape == (0, *SIZE)


def test_network_without_masks_gives_boxes():
    model = make_model("mask_rcnn", "MODEL.MASK_ON", False)
    found = with_test_time_augmentation(model, min_sizes=[64], max_size=200)([make_input()])
    assert len(found[0]["instances"]) > 0 and not found[0]["instances"].has("pred_masks")


class Pointer(nn.Module):
    """Finds the brightest red pixel of an image and the block around it, at the output's size."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, inputs):
        results = []
        for x in inputs:
            image = x["image"]
            height, width = image.shape[1:]
            self.seen.append((height, width))
            position = int(image[0].flatten().argmax())
            row, column = position // width, position % width
            scale = x["height"] / height
            assert scale == x["width"] / width
            y0, x0 = int(row * scale), int(column * scale)
            block = int(scale) if scale > 1 else 1
            found = Instances((x["height"], x["width"]))
            found.pred_boxes = Boxes(
                torch.tensor([[x0, y0, x0 + block, y0 + block]], dtype=torch.float32)
            )
            found.scores = image[0].flatten()[position][None].float() / 255
            found.pred_classes = torch.tensor([1])
            found.pred_masks = torch.zeros(1, x["height"], x["width"], dtype=torch.bool)
            found.pred_masks[0, y0 : y0 + block, x0 : x0 + block] = True
            results.append({"instances": found})
        return results


def spot(row, column, height=8, width=12):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, row, column] = 255
    return {"image": image}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (7, 11), (3, 2)])
def test_views_of_any_model_map_back_exactly(flip, place):
    model = Pointer()
    augmented = with_test_time_augmentation(model, min_sizes=[8], max_size=100, flip=flip)
    assert isinstance(augmented, MergedViewsTTA)
    found = augmented([spot(*place)])[0]["instances"]
    assert model.seen == [(8, 12)] * (1 + flip)
    assert len(found) == 1 and found.scores.item() == 1.0
    row, column = place
    assert found.pred_boxes.tensor.tolist() == [[column, row, column + 1, row + 1]]
    assert found.pred_masks.nonzero().tolist() == [[0, row, column]]


def test_boxes_of_resized_views_need_no_correction():
    model = Pointer()
    augmented = with_test_time_augmentation(model, min_sizes=[8, 4], max_size=100)
    x = {**spot(4, 6), "height": 16, "width": 24}
    augmented([x])
    assert model.seen == [(8, 12), (8, 12), (4, 6), (4, 6)]
    assert "transforms" not in x


def detections(*rows, size=(10, 20)):
    """Instances of rows (x0, y0, x1, y1, score, class); masks fill the boxes."""
    found = Instances(size)
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    found.pred_boxes, found.scores = Boxes(rows[:, :4]), rows[:, 4]
    found.pred_classes = rows[:, 5].long()
    found.pred_masks = torch.zeros(len(rows), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(found.pred_masks, rows[:, :4].int().tolist()):
        mask[y0:y1, x0:x1] = True
    return found


def test_equal_objects_of_two_views_become_one():
    first = detections((0, 0, 8, 8, 0.9, 0), (10, 0, 18, 8, 0.5, 1))
    second = detections((2, 0, 10, 8, 0.3, 0), (10, 0, 18, 8, 0.7, 1))
    merged = merge_views([first, second])
    assert merged.scores.tolist() == pytest.approx([0.9, 0.7])
    assert merged.pred_classes.tolist() == [0, 1]
    # 0.75 of the weight is at the first box
    assert merged.pred_boxes.tensor[0].tolist() == pytest.approx([0.5, 0, 8.5, 8])
    assert merged.pred_masks[0].equal(first.pred_masks[0])
    assert merged.pred_boxes.tensor[1].tolist() == pytest.approx([10, 0, 18, 8])


def test_mask_is_the_weighted_majority():
    views = [detections((0, 0, x1, 8, score, 0)) for x1, score in ((8, 0.4), (6, 0.3), (6, 0.3))]
    merged = merge_views(views)
    assert len(merged) == 1
    assert merged.pred_masks[0].equal(views[1].pred_masks[0])


def test_detections_of_one_view_or_of_other_classes_stay_apart():
    twice = detections((0, 0, 8, 8, 0.9, 0), (0, 0, 8, 8, 0.8, 0))
    merged = merge_views([twice, detections((0, 0, 8, 8, 0.7, 1))])
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8])  # limited to the largest view
    merged = merge_views([twice, detections((0, 0, 8, 8, 0.7, 1))], max_detections=10)
    assert merged.pred_classes.tolist() == [0, 0, 1]
    assert len(merge_views([twice, detections((0, 0, 2, 8, 0.7, 0))], 0.5, 10)) == 3


def test_a_group_that_agrees_on_no_pixel_keeps_its_best_mask():
    views = [detections((0, 0, 8, 8, s, 0)) for s in (0.4, 0.3, 0.3)]
    for column, view in zip((0, 3, 6), views):
        view.pred_masks[:] = False
        view.pred_masks[:, :, column] = True
    assert merge_views(views).pred_masks.equal(views[0].pred_masks)


def test_augmentation_chosen_by_the_model_comes_first():
    class Own(Pointer):
        def with_test_time_augmentation(self, mapper):
            return ("own", mapper.min_sizes)

    made = with_test_time_augmentation(Own(), min_sizes=(4, 8), max_size=9, flip=False)
    assert made == ("own", [4, 8])


def test_what_cannot_be_undone_is_an_error():
    with pytest.raises(UserError, match="needs a size: set TEST.AUG.MIN_SIZES"):
        with_test_time_augmentation(Pointer(), min_sizes=[], max_size=9)

    def upside_down(x):
        return [{**x, "transforms": TransformList([VFlipTransform(8)])}]

    with pytest.raises(UserError, match="not VFlipTransform"):
        MergedViewsTTA(Pointer(), upside_down)([spot(1, 1)])

    def twice(x):
        flips = [HFlipTransform(12), ResizeTransform(8, 12, 8, 12), HFlipTransform(12)]
        return [{**x, "transforms": TransformList(flips)}]

    found = MergedViewsTTA(Pointer(), twice)([spot(1, 2)])[0]["instances"]
    assert found.pred_masks.nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_config_decides_whether_an_evaluation_is_augmented(
    kind, enabled, shapes_few, tmp_path, monkeypatch
):
    from d2ext.engine import build_experiment, loop

    config = Path(__file__).resolve().parents[2] / f"configs/mask_rcnn_tiny.{kind}"
    overrides = [f"DATASETS.TRAIN={shapes_few}", f"DATASETS.TEST={shapes_few}"]
    overrides += [f"OUTPUT_DIR={tmp_path}", "MODEL.DEVICE=cpu", "TEST.AUG.FLIP=false"]
    overrides += [f"TEST.AUG.ENABLED={enabled}", "train.test_aug.min_sizes=[64,80]"]
    experiment = build_experiment(str(config), overrides)
    weights = {"model": experiment.build_model().state_dict()}
    torch.save(weights, tmp_path / "weights.pth")
    experiment.init_checkpoint, experiment.weights_chosen = str(tmp_path / "weights.pth"), True
    evaluated = []
    monkeypatch.setattr(loop, "evaluate", lambda e, model: evaluated.append(model) or {})
    loop.evaluate_checkpoint(experiment)
    (model,) = evaluated
    assert isinstance(model, GeneralizedRCNNWithTTA) == enabled
    if enabled:
        mapper = model.tta_mapper
        assert (mapper.min_sizes, mapper.max_size, mapper.flip) == ([64, 80], 400, False)
        assert not model.model.training


def test_boxes_of_all_views_are_merged_by_the_soft_nms_of_the_heads():
    model = make_model("htc", "MODEL.SOFT_NMS.METHOD", "gaussian")
    augmented = with_test_time_augmentation(model, min_sizes=[64], max_size=96)
    boxes = torch.tensor([[0.0, 0, 40, 40], [2, 0, 42, 40], [50, 0, 120, 30], [0, 0, 40, 40]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    classes = torch.tensor([1, 1, 0, 2])
    inside = Boxes(boxes.clone())
    inside.clip(SIZE)
    for most, kept in ((-1, 4), (3, 3)):
        augmented.cfg.TEST.DETECTIONS_PER_IMAGE = most
        merged = augmented._merge_detections(boxes, scores, classes, SIZE)
        rows, found = model.roi_heads.soft_nms(inside.tensor, scores, classes)
        assert torch.equal(merged.scores, found[:kept]) and len(merged) == kept
        assert torch.equal(merged.pred_classes, classes[rows[:kept]])
        assert torch.equal(merged.pred_boxes.tensor, inside.tensor[rows[:kept]])
    assert 0 < merged.scores[-1] < 0.7  # lowered, not removed
