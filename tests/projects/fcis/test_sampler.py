"""Which regions train FCIS."""

import pytest
import torch

from d2ext.modeling.regions.sampling import image_seeds
from d2ext.projects.fcis import RegionSampler

from detectron2.structures import Boxes, Instances, pairwise_iou

K = 3


def make_target(count=2):
    gt = torch.tensor([[10.0, 10, 30, 30], [50, 40, 80, 60]])[:count]
    return Instances((70, 90), gt_boxes=Boxes(gt), gt_classes=torch.tensor([2, 0])[:count])


def make_proposals(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[20.0, 20], [65, 50]]).repeat(count // 2, 1)
    corners = centres + 12 * torch.randn(count, 2, generator=generator)
    return Boxes(torch.cat([corners - 10, corners + 10], dim=1).clamp(0, 70))


def sample(sampler, proposals, target, seed=0):
    with image_seeds([{"sample_seed": seed}]):
        return sampler([proposals], [target], "regions")[0]


def test_a_sample_holds_at_most_its_share_of_positives():
    sampler = RegionSampler(num_classes=K, batch_size_per_image=32, background_iou=0.1)
    regions = sample(sampler, make_proposals(), make_target())
    iou = pairwise_iou(make_target().gt_boxes, regions.proposal_boxes).max(dim=0).values
    assert len(regions) == 32
    assert (regions.gt_classes[:8] < K).all() and (iou[:8] >= 0.5).all()
    assert (regions.gt_classes[8:] == K).all()
    assert ((iou[8:] >= 0.1) & (iou[8:] < 0.5)).all()
    assert len(regions.proposal_boxes.tensor.unique(dim=0)) == 32


def test_a_sample_that_is_too_small_is_filled_up_with_what_was_not_drawn_as_background():
    sampler = RegionSampler(
        num_classes=K, batch_size_per_image=40, background_iou=0.45, positive_fraction=0.05
    )
    proposals = make_proposals(30)
    regions = sample(sampler, proposals, make_target())
    positive = regions.gt_classes < K
    assert len(regions) == 40 and positive.sum() == 2
    drawn = {tuple(b) for b in regions.proposal_boxes.tensor[positive].tolist()}
    others = [tuple(b) for b in regions.proposal_boxes.tensor[~positive].tolist()]
    assert not drawn & set(others)
    # 32 candidates, of which 30 are left: all of them appear, some twice.
    assert len(set(others)) == 30 and len(others) == 38
    iou = pairwise_iou(make_target().gt_boxes, regions.proposal_boxes).max(dim=0).values
    assert (iou[~positive] >= 0.5).any(), "positives that were not drawn become background"
    assert (iou[~positive] < 0.45).any()


def test_samples_depend_on_the_seed_of_the_image_only():
    sampler = RegionSampler(num_classes=K, batch_size_per_image=16)
    first, again, other = (
        sample(sampler, make_proposals(), make_target(), seed).proposal_boxes.tensor
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("size", [-1, 16])
def test_images_without_objects_have_background_only(size):
    sampler = RegionSampler(num_classes=K, batch_size_per_image=size, background_iou=0.1)
    regions = sample(sampler, make_proposals(20), make_target(0))
    assert len(regions) == (20 if size < 0 else 16)
    assert (regions.gt_classes == K).all()


@pytest.mark.parametrize("size", [-1, 16])
def test_images_without_proposals_train_on_their_objects(size):
    sampler = RegionSampler(num_classes=K, batch_size_per_image=size)
    regions = sample(sampler, Boxes(torch.zeros(0, 4)), make_target())
    assert set(regions.gt_classes[:2].tolist()) == {0, 2}
    nothing = sample(sampler, Boxes(torch.zeros(0, 4)), make_target(0))
    assert len(nothing) == 0
