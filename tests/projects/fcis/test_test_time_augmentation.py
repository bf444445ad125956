"""Several sizes and mirror images of one image vote together."""

import pytest
import torch

from d2ext.modeling.regions.boxes import to_inclusive
from d2ext.modeling.test_time_augmentation import is_mirrored, with_test_time_augmentation
from d2ext.projects.fcis import FCISWithTTA
from d2ext.utils.testing import random_batch

from tests.projects.fcis.helpers import make_model

SIZE = (64, 96)


@pytest.fixture
def model():
    return make_model().eval()


def predict(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model(batch)]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert torch.equal(first.pred_masks, second.pred_masks)


def test_one_size_without_mirroring_changes_nothing(model):
    batch = random_batch(2, SIZE)
    tta = FCISWithTTA.from_sizes(model, [64], 1000, flip=False)
    for ours, expected in zip(predict(tta, batch), predict(model, batch)):
        assert_same(ours, expected)


def test_the_same_image_twice_votes_as_once(model):
    """Every voter counts double, which leaves all weighted means as they are."""
    batch = random_batch(1, SIZE)
    tta = FCISWithTTA.from_sizes(model, [64, 64], 1000, flip=False)
    (ours,), (expected,) = predict(tta, batch), predict(model, batch)
    assert len(ours) == len(expected)
    torch.testing.assert_close(ours.scores, expected.scores)
    assert (ours.pred_masks == expected.pred_masks).float().mean() > 0.999


def test_regions_of_the_mirror_image_are_mirrored_back(model, monkeypatch):
    """With a network that gives the same regions for any input, mirroring mirrors the results."""
    batch = random_batch(1, SIZE)
    pool = model.candidates(batch)[0]
    monkeypatch.setattr(model, "candidates", lambda inputs: [pool])
    (expected,) = predict(FCISWithTTA.from_sizes(model, [64], 1000, flip=False), batch)

    def mirrored_only(inputs):
        return [v for v in mapper(inputs) if is_mirrored(v["transforms"])]

    mapper = FCISWithTTA.from_sizes(model, [64], 1000).tta_mapper
    (ours,) = predict(FCISWithTTA(model, mirrored_only), batch)
    x1, y1, x2, y2 = to_inclusive(expected.pred_boxes.tensor).unbind(1)
    boxes = torch.stack([95 - x2, y1, 95 - x1, y2], dim=1)
    close = (to_inclusive(ours.pred_boxes.tensor) - boxes).abs().amax(dim=1) <= 1
    assert len(ours) == len(expected) and close.float().mean() > 0.9  # halves round to even
    agree = (ours.pred_masks.flip(-1) == expected.pred_masks).float().mean()
    assert agree > 0.97


def test_sizes_are_brought_to_the_size_of_the_output(model):
    batch = random_batch(1, SIZE)
    batch[0].update(height=128, width=192)
    (result,) = predict(FCISWithTTA.from_sizes(model, [48, 80], 200), batch)
    assert result.pred_masks.shape == (len(result), 128, 192) and len(result) > 0
    assert result.pred_boxes.tensor[:, 2].max() > 96  # in pixels of the output
    assert result.pred_boxes.tensor[:, 2].max() <= 192


def test_all_versions_enter_one_pool(model, monkeypatch):
    batch = random_batch(1, SIZE)
    seen = []
    vote = model.roi_heads.voting.forward

    def spy(boxes, masks, scores, size):
        seen.append(len(boxes))
        return vote(boxes, masks, scores, size)

    monkeypatch.setattr(model.roi_heads.voting, "forward", spy)
    predict(FCISWithTTA.from_sizes(model, [64], 1000, flip=True), batch)
    mirrored = {**batch[0], "image": batch[0]["image"].flip(-1)}
    pools = [model.candidates([x])[0] for x in (batch[0], mirrored)]
    assert seen == [len(pools[0]) + len(pools[1])]


def test_evaluation_with_augmentation_lets_the_regions_vote(model):
    batch = random_batch(1, SIZE)
    tta = with_test_time_augmentation(model, min_sizes=[64], max_size=1000, flip=True)
    assert isinstance(tta, FCISWithTTA)
    expected = predict(FCISWithTTA.from_sizes(model, [64], 1000), batch)
    assert_same(predict(tta, batch)[0], expected[0])
