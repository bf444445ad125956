"""Region masks are pasted by d2ext.ops wherever detectron2 pastes them."""

import pytest
import torch
from torch.nn import functional as F

from d2ext.modeling import pasting
from d2ext.modeling.test_time_augmentation import with_test_time_augmentation
from d2ext.ops import has_native

from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, ROIMasks

from tests.modeling.test_test_time_augmentation import KINDS, make_input, make_model

pytestmark = pytest.mark.skipif(not has_native(), reason="without kernels detectron2 pastes")
SIZE = (70, 110)


def detections(count=30, side=28, size=SIZE, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 4, 4, generator=draw)
    masks = F.interpolate(coarse, (side, side), mode="bilinear")[:, 0]
    ends = torch.rand(count, 2, 2, generator=draw) * torch.tensor([size[1], size[0]])
    boxes = torch.cat([ends.amin(1), ends.amax(1) + 1], dim=1)
    found = Instances(size, pred_boxes=Boxes(boxes), scores=torch.ones(count))
    found.pred_masks = masks[:, None].to(dtype)
    return found


@pytest.fixture
def calls(monkeypatch):
    """The sizes of images into which d2ext pasted."""
    seen, original = [], pasting.paste_masks

    def counted(masks, boxes, image_size, **options):
        seen.append(image_size)
        return original(masks, boxes, image_size, **options)

    monkeypatch.setattr(pasting, "paste_masks", counted)
    return seen


@pytest.mark.parametrize("side", [14, 28])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_differs_from_detectron2_at_the_threshold_only(calls, side, threshold):
    found = detections(side=side)
    result = detector_postprocess(found, 140, 220, mask_threshold=threshold)
    masks, boxes = detections(side=side).pred_masks[:, 0], result.pred_boxes.tensor
    expected = paste_masks_in_image(masks, boxes, (140, 220), threshold)
    at_threshold = expected & ~paste_masks_in_image(masks, boxes, (140, 220), threshold + 1e-5)
    at_threshold |= ~expected & paste_masks_in_image(masks, boxes, (140, 220), threshold - 1e-5)
    assert calls == [(140, 220)] and result.pred_masks.dtype == torch.bool
    differs = result.pred_masks != expected
    assert not (differs & ~at_threshold).any() and differs.float().mean() < 1e-4
    assert 0.01 < expected.float().mean() < 0.95


def test_no_objects_half_precision_and_whole_numbers(calls):
    boxes = Boxes(torch.tensor([[2.0, 3.0, 30.0, 20.0]]))
    for masks in (torch.ones(1, 7, 7).half(), torch.ones(1, 7, 7, dtype=torch.uint8)):
        pasted = ROIMasks(masks).to_bitmasks(boxes, 40, 50).tensor
        assert pasted.shape == (1, 40, 50) and pasted[0, 4:19, 3:29].all()
    none = ROIMasks(torch.zeros(0, 7, 7)).to_bitmasks(boxes[:0], 40, 50).tensor
    assert none.shape == (0, 40, 50) and none.dtype == torch.bool
    assert len(calls) == 2


def test_detectron2_pastes_what_has_no_threshold_or_is_traced(calls):
    found = detections(3)
    masks, boxes = found.pred_masks[:, 0], found.pred_boxes.tensor
    assert pasting.paste_region_masks(masks, boxes, *SIZE, threshold=0.4) is None
    results = []

    def note(masks, boxes):
        results.append(pasting.paste_region_masks(masks, boxes, *SIZE))
        return masks

    torch.jit.trace(note, (masks, boxes), check_trace=False)
    assert results == [None] and not calls


@pytest.mark.parametrize("kind", KINDS)
def test_results_of_models_and_of_test_time_augmentation_are_pasted_here(calls, kind):
    model, inputs = make_model(kind), [make_input(height=130, width=170)]
    with torch.no_grad():
        (result,) = model(inputs)
        (merged,) = with_test_time_augmentation(model, min_sizes=[64], max_size=200)(inputs)
    assert calls == [(130, 170)] * 2
    for found in (result["instances"], merged["instances"]):
        assert len(found) and found.pred_masks.shape == (len(found), 130, 170)
