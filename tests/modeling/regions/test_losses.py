import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import d2ext.modeling  # noqa: F401
from d2ext.modeling.regions.losses import (
    box_regression_loss,
    classification_loss,
    divide_by_count,
    global_mean_count,
    mask_bce_loss,
    pick_class,
)

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

UNIT = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


def sampled(boxes, gt_boxes, classes):
    return Instances(
        (100, 100),
        proposal_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_boxes=Boxes(torch.tensor(gt_boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def test_one_process_counts_its_own_items():
    device = torch.device("cpu")
    assert global_mean_count(3, device).item() == 3
    assert global_mean_count(torch.tensor(4), device).item() == 4
    assert global_mean_count(0, device).item() == 0


def test_division_by_zero_items_gives_a_connected_zero():
    x = torch.ones(3, requires_grad=True)
    loss = divide_by_count(x[:0].sum(), 0)
    loss.backward()
    assert loss.item() == 0 and x.grad.tolist() == [0, 0, 0]


def test_classification_loss_is_the_mean_cross_entropy():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 3, 1, 3, 2])
    rows = [math.log(sum(map(math.exp, row))) - row[c] for row, c in zip(logits.tolist(), classes)]
    expected = sum(rows) / 5
    assert classification_loss(logits, classes).item() == pytest.approx(expected, rel=1e-5)


def test_box_loss_sums_positives_and_divides_by_all_regions():
    proposals = [
        sampled([[0, 0, 10, 20], [0, 0, 5, 5]], [[1, 0, 11, 20], [9, 9, 9, 9]], [1, 3]),
        sampled([[0, 0, 10, 10]], [[0, 0, 20, 10]], [0]),
    ]
    deltas = torch.tensor([[0.0, 2.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0], [0.5, 0.0, 0.0, 0.0]])
    # targets: (0.1, 0, 0, 0) and (0.5, 0, ln 2, 0); smooth L1 with beta 1
    expected = (0.5 * 0.1**2 + (2 - 0.5) + 0.5 * math.log(2) ** 2) / 3
    assert box_regression_loss(deltas, proposals, UNIT, 3, 1.0).item() == pytest.approx(expected)
    absolute = (0.1 + 2 + math.log(2)) / 3
    assert box_regression_loss(deltas, proposals, UNIT, 3, 0.0).item() == pytest.approx(absolute)


def test_class_specific_box_loss_reads_the_deltas_of_the_true_class():
    proposals = [sampled([[0, 0, 10, 10]], [[0, 0, 10, 10]], [1])]
    deltas = torch.zeros(1, 12)
    deltas[0, 4:8] = 3.0
    assert box_regression_loss(deltas, proposals, UNIT, 3, 0.0).item() == pytest.approx(12)


@pytest.mark.parametrize("regions", [0, 2])
def test_losses_without_positives_are_connected_zeros(regions):
    logits = torch.randn(regions, 4, requires_grad=True)
    deltas = torch.randn(regions, 4, requires_grad=True)
    masks = torch.randn(0, 3, 4, 4, requires_grad=True)
    boxes = [[0, 0, 5, 5]] * regions
    proposals = [sampled(boxes, [[0, 0, 0, 0]] * regions, [3] * regions)]
    loss = box_regression_loss(deltas, proposals, UNIT, 3, 1.0)
    loss = loss + mask_bce_loss(masks, torch.zeros(0, dtype=torch.int64), [])
    assert loss.item() == 0
    (loss + classification_loss(logits, proposals[0].gt_classes)).backward()
    assert deltas.grad.abs().sum() == 0 and masks.grad is not None and logits.grad is not None


def test_mask_loss_is_the_mean_over_pixels_of_the_true_class():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    p = torch.sigmoid(torch.stack([logits[0, 2], logits[1, 0]]))
    expected = -torch.where(targets, p.log(), (1 - p).log()).mean()
    loss = mask_bce_loss(logits, torch.tensor([2, 0]), [targets[:1], targets[1:]])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pick_class_takes_the_only_channel_of_agnostic_predictions():
    x = torch.rand(3, 1, 2)
    assert torch.equal(pick_class(x, torch.tensor([2, 0, 1])), x[:, 0])


CLASSES = torch.tensor([0, 3, 1, 3, 2, 0])


def _gradient(weight, rows):
    """d loss / d weight of a toy head on some of six regions; the others are another process's."""
    x = torch.arange(12.0).reshape(6, 2)[rows] / 10
    weight = weight.clone().requires_grad_()
    out = x @ weight
    boxes = [[0, 0, 10, 10 + i] for i in range(6)]
    gt_boxes = [[1, 0, 11, 12]] * len(rows)
    proposals = [sampled([boxes[r] for r in rows], gt_boxes, CLASSES[rows].tolist())]
    positive = CLASSES[rows] < 3
    masks = out[:, 8:][positive].reshape(-1, 1, 2, 2)
    loss = classification_loss(out[:, :4], CLASSES[rows])
    loss = loss + box_regression_loss(out[:, 4:8], proposals, UNIT, 3, 1.0)
    targets = [torch.ones(len(masks), 2, 2, dtype=torch.bool)]
    (loss + mask_bce_loss(masks, CLASSES[rows][positive], targets)).backward()
    return weight.grad


def _worker(rank, folder):
    """One of two processes: saves the averaged gradient of its share of the regions."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows = [[0, 1, 2, 4, 5], [3]][rank]  # the second process has no positive
    gradient = _gradient(torch.load(f"{folder}/weight.pt"), rows)
    dist.all_reduce(gradient)
    torch.save(gradient / 2, f"{folder}/gradient{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_mean_gradient_of_two_processes_equals_that_of_one_with_the_whole_batch(
    tmp_path, run_python
):
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    torch.save(weight, tmp_path / "weight.pt")
    expected = _gradient(weight, [0, 1, 2, 3, 4, 5])
    with ThreadPoolExecutor(2) as pool:
        workers = list(pool.map(lambda rank: run_python(__file__, rank, tmp_path), range(2)))
    for rank, worker in enumerate(workers):
        assert worker.returncode == 0, worker.stderr
        gradient = torch.load(tmp_path / f"gradient{rank}.pt")
        assert torch.allclose(gradient, expected, atol=1e-6)


if __name__ == "__main__":  # a process of the test above
    _worker(int(sys.argv[1]), sys.argv[2])
