"""Soft-NMS against a plain loop over boxes."""

import math

import pytest
import torch

from d2ext.errors import UserError
from d2ext.modeling.regions.soft_nms import SoftNMS


def iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height
    return width * height / union


def plain(boxes, scores, classes, soft):
    """The paper's figure 2, class by class; (score, row) of what is left, the best first."""
    found = []
    for label in set(classes):
        left = {i: scores[i] for i in range(len(boxes)) if classes[i] == label}
        while left:
            best = max(left, key=left.get)
            score = left.pop(best)
            if score < soft.min_score:
                break
            found.append((score, best))
            for i in left:
                overlap = iou(boxes[best], boxes[i])
                if soft.method == "gaussian":
                    left[i] *= math.exp(-(overlap**2) / soft.sigma)
                elif overlap >= soft.iou_threshold:
                    left[i] *= 1 - overlap
    return sorted(found, reverse=True)


def random_boxes(seed, count=60, num_classes=4):
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw, dtype=torch.float64) * 40
    size = 10 + 30 * torch.rand(count, 2, generator=draw, dtype=torch.float64)
    scores = torch.rand(count, generator=draw, dtype=torch.float64)
    classes = torch.randint(num_classes, (count,), generator=draw)
    return torch.cat([corner, corner + size], dim=1), scores, classes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "soft",
    [
        SoftNMS("linear"),
        SoftNMS("linear", iou_threshold=0.3, min_score=0.1),
        SoftNMS("gaussian"),
        SoftNMS("gaussian", sigma=0.2, min_score=0.05),
    ],
)
def test_all_classes_at_once_give_what_a_plain_loop_gives(soft, seed):
    boxes, scores, classes = random_boxes(seed)
    rows, found = soft(boxes, scores, classes)
    expected = plain(boxes.tolist(), scores.tolist(), classes.tolist(), soft)
    assert rows.tolist() == [row for _, row in expected]
    torch.testing.assert_close(found.tolist(), [score for score, _ in expected])
    assert 0 < len(rows) <= len(boxes)


def test_with_a_linear_threshold_of_none_only_equal_boxes_vanish():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [5, 0, 15, 10]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    rows, found = SoftNMS("linear", iou_threshold=0.5)(boxes, scores, classes)
    assert rows.tolist() == [0, 2]
    torch.testing.assert_close(found, torch.tensor([0.9, 0.7]))  # IoU 1/3 is below the threshold
    rows, _ = SoftNMS("linear", iou_threshold=0.5)(boxes, scores, torch.arange(3))
    assert rows.tolist() == [0, 1, 2]  # of other classes


def test_no_boxes_give_none():
    rows, scores = SoftNMS("gaussian")(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    assert rows.shape == scores.shape == (0,) and rows.dtype == torch.int64


@pytest.mark.parametrize(
    "soft, words",
    [
        (SoftNMS("hard"), "is 'hard'; it has to be one of"),
        (SoftNMS("gaussian", sigma=0), "above 0"),
    ],
)
def test_impossible_settings_are_refused(soft, words):
    with pytest.raises(UserError, match=words):
        soft.check()
