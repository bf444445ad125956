import numpy as np
import pytest
import torch

from d2ext.errors import UserError
from d2ext.projects.mnc import InstanceVoting

from detectron2.structures import Boxes, Instances

cv2 = pytest.importorskip("cv2")
SIZE = (40, 60)


def candidates_of(boxes, masks, scores, size=SIZE):
    return Instances(
        size,
        pred_boxes=Boxes(torch.as_tensor(boxes, dtype=torch.float32)),
        pred_masks=torch.as_tensor(masks)[:, None],
        class_scores=torch.as_tensor(scores),
    )


@pytest.fixture
def crowd():
    """30 overlapping candidates of 2 classes."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(30, 2, generator=generator) * torch.tensor([35.0, 20.0])
    boxes = torch.cat([low, low + 8 + 12 * torch.rand(30, 2, generator=generator)], dim=1)
    blobs = torch.rand(30, 1, 3, 3, generator=generator)
    masks = torch.nn.functional.interpolate(blobs, (9, 9), mode="bicubic").clamp(0, 1)[:, 0]
    scores = torch.rand(30, 2, generator=generator) / 2
    return candidates_of(boxes, masks, scores)


@pytest.mark.parametrize("kind", ["compat", "direct"])
def test_results_are_standard_instances(crowd, kind):
    found = InstanceVoting(masks=kind, max_per_image=7)(crowd, SIZE)
    assert len(found) == 7 and found.image_size == SIZE
    assert found.pred_masks.shape == (7, *SIZE) and found.pred_masks.dtype == torch.bool
    assert found.scores.dtype == torch.float32 and found.pred_classes.dtype == torch.int64
    best = torch.sort(crowd.class_scores.flatten(), descending=True).values[0]
    assert found.scores.max() == best


def test_direct_masks_fill_their_boxes(crowd):
    """A box is tight around what the vote gives at the resolution of the image."""
    found = InstanceVoting(masks="direct", mode="mnc")(crowd, SIZE)
    assert len(found) > 10
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.tolist(), strict=True):
        y, x = mask.nonzero(as_tuple=True)
        assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box


def test_direct_and_resized_masks_mostly_agree(crowd):
    direct = InstanceVoting(masks="direct")(crowd, SIZE).pred_masks
    compat = InstanceVoting(masks="compat")(crowd, SIZE).pred_masks
    iou = (direct & compat).flatten(1).sum(1) / (direct | compat).flatten(1).sum(1)
    assert 0.7 < iou.mean() < 1


def test_resized_masks_equal_those_of_opencv(crowd):
    voting = InstanceVoting(masks="compat")
    found = voting(crowd, SIZE)
    inclusive = crowd.pred_boxes.tensor - torch.tensor([0.0, 0, 1, 1])
    voted = voting.vote(inclusive, crowd.pred_masks[:, 0], crowd.class_scores, SIZE)
    for mask, small, (x1, y1, x2, y2) in zip(
        found.pred_masks.numpy(), voted.masks.numpy(), voted.boxes.tolist(), strict=True
    ):
        binary = (small >= 0.4).astype(np.float32)
        resized = cv2.resize(binary, (x2 - x1 + 1, y2 - y1 + 1), interpolation=cv2.INTER_LINEAR)
        assert (mask[y1 : y2 + 1, x1 : x2 + 1] == (resized >= 0.4)).mean() > 0.97
        assert mask.sum() == mask[y1 : y2 + 1, x1 : x2 + 1].sum()


def test_without_voting_every_instance_keeps_its_box(crowd):
    found = InstanceVoting(voting=False)(crowd, SIZE)
    rows = {tuple(box) for box in crowd.pred_boxes.tensor.tolist()}
    kept = found.pred_boxes.tensor
    for box in kept:
        assert min((box - torch.tensor(row)).abs().max() for row in rows) < 1e-4
    voted = InstanceVoting()(crowd, SIZE)
    assert found.scores.equal(voted.scores) and found.pred_classes.equal(voted.pred_classes)
    assert not found.pred_masks.equal(voted.pred_masks)


def test_low_scores_are_dropped_only_on_request(crowd):
    every = InstanceVoting()(crowd, SIZE)
    some = InstanceVoting(score_threshold=0.3)(crowd, SIZE)
    assert every.scores.min() < 0.3 <= some.scores.min()
    assert len(some) == (every.scores >= 0.3).sum()


@pytest.mark.parametrize("legacy", [False, True])
def test_boxes_are_scaled_to_the_original_image(legacy):
    """Twice the size: edges are doubled, or the indices of first and last pixels."""
    full = torch.ones(1, 9, 9)
    given = candidates_of([[4, 6, 20, 16]], full, [[0.9]], size=(20, 30))
    found = InstanceVoting(masks="direct", legacy_plus_one=legacy)(given, SIZE)
    expected = [8, 12, 39, 31] if legacy else [8, 12, 40, 32]
    assert found.pred_boxes.tensor.tolist() == [expected]
    x1, y1, x2, y2 = expected
    assert (
        found.pred_masks.sum() == found.pred_masks[0, y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)
    )


@pytest.mark.parametrize("voting", [False, True])
def test_no_candidates_give_no_instances(voting):
    given = candidates_of(torch.zeros(0, 4), torch.zeros(0, 9, 9), torch.zeros(0, 2))
    for kind in ("compat", "direct"):
        found = InstanceVoting(voting=voting, masks=kind)(given, SIZE)
        assert len(found) == 0 and found.pred_masks.shape == (0, *SIZE)


def test_unknown_modes_are_refused():
    with pytest.raises(UserError, match="OUTPUT_MASKS 'x'"):
        InstanceVoting(masks="x")
    with pytest.raises(UserError, match="VOTING_MODE 'fcis'"):
        InstanceVoting(mode="fcis")
