import torch

from d2ext.modeling.regions.sampling import image_seeds
from d2ext.projects.mnc import MNCSampler

from detectron2.structures import Boxes, Instances

from tests.projects.mnc.helpers import ground_truth


def proposals_at(boxes, size=(40, 60)):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    result = Instances(size, proposal_boxes=Boxes(boxes))
    result.anchor_index = torch.arange(len(boxes)) + 100
    return result


def test_samples_are_labelled_and_know_their_anchor():
    target = ground_truth([[0, 0, 20, 20], [30, 10, 50, 30]], [2, 0])
    # IoU 0.9 with the first, 0.5 with the second, 0.25 and 0 with either.
    proposals = proposals_at([[0, 0, 20, 18], [30, 10, 50, 20], [0, 0, 10, 10], [21, 31, 29, 39]])
    sampler = MNCSampler(num_classes=3, batch_size_per_image=64, positive_fraction=1.0)
    (sample,) = sampler([proposals], [target], "stage2")
    rows = [
        (anchor, tuple(box), foreground, label, index)
        for anchor, box, foreground, label, index in zip(
            sample.anchor_index.tolist(),
            sample.proposal_boxes.tensor.tolist(),
            sample.foreground.tolist(),
            sample.gt_classes.tolist(),
            sample.gt_index.tolist(),
            strict=True,
        )
    ]
    assert rows == [
        (100, (0, 0, 20, 18), True, 2, 0),
        (101, (30, 10, 50, 20), True, 0, 1),
        (-1, (0, 0, 20, 20), True, 2, 0),
        (-1, (30, 10, 50, 30), True, 0, 1),
        # IoU of exactly one half belongs to both intervals, with the label of each.
        (101, (30, 10, 50, 20), False, 3, 1),
        (102, (0, 0, 10, 10), False, 3, 0),
        (103, (21, 31, 29, 39), False, 3, 0),
    ]
    expected = target.gt_boxes.tensor[sample.gt_index]
    assert sample.gt_boxes.tensor.equal(expected)


def test_sampling_depends_on_the_seed_of_the_image_only():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 10], dim=1).tolist()
    target = ground_truth([[5, 5, 20, 20]], [1])
    sampler = MNCSampler(num_classes=3, batch_size_per_image=16)

    def draw(*seeds):
        with image_seeds([{"sample_seed": seed} for seed in seeds]):
            found = sampler([proposals_at(boxes)] * len(seeds), [target] * len(seeds), "stage2")
        return [s.anchor_index.tolist() for s in found]

    first, second = draw(1, 2)
    assert first != second
    assert draw(2, 1) == [second, first]


def test_every_box_of_the_second_pass_is_kept_with_the_ground_truth():
    target = ground_truth([[0, 0, 20, 20]], [2])
    boxes = torch.tensor([[30.0, 30, 40, 40], [0, 0, 20, 19]], requires_grad=True)
    (sample,) = MNCSampler(num_classes=3, batch_size_per_image=1).label_all([boxes], [target])
    assert sample.proposal_boxes.tensor.tolist() == [
        [0, 0, 20, 19],
        [0, 0, 20, 20],
        [30, 30, 40, 40],
    ]
    assert sample.gt_classes.tolist() == [2, 2, 3]
    sample.proposal_boxes.tensor.sum().backward()
    assert boxes.grad.tolist() == [[1.0] * 4] * 2


def test_images_without_objects_give_background_only():
    target = ground_truth([], [])
    sampler = MNCSampler(num_classes=3, batch_size_per_image=64)
    (sample,) = sampler([proposals_at([[0, 0, 9, 9]] * 30)], [target], "stage2")
    assert len(sample) == 10 and not sample.foreground.any()  # the share of IoU below 0.1
    assert sample.gt_classes.tolist() == [3] * 10
    (nothing,) = sampler([proposals_at([])], [target], "stage2")
    assert len(nothing) == 0
