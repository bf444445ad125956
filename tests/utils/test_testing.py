import pytest
import torch
from torchvision.ops import nms

from d2ext.utils.testing import count_operators

X = torch.tensor([3.0, 1.0, 2.0])
ROWS = torch.tensor([2, 0])
BOXES = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])


@pytest.mark.parametrize(
    "step, name",
    [
        (lambda: X.sum().item(), "_local_scalar_dense"),
        (lambda: bool(X[0] > 1), "_local_scalar_dense"),
        (lambda: X.tolist(), "tolist"),
        (lambda: X.cpu(), "cpu"),
        (lambda: X.nonzero(), "nonzero"),
        (lambda: X[X > 1], "index"),
        (lambda: X.clone().index_put_((X > 1,), X[:2]), "index_put_"),
        (lambda: X.masked_select(X > 1), "masked_select"),
        (lambda: X.unique(), "_unique2"),
        (lambda: ROWS.repeat_interleave(ROWS), "repeat_interleave"),
        (lambda: nms(BOXES, X[:2], 0.5), "nms"),
    ],
)
def test_what_makes_the_host_wait_is_counted(step, name):
    with count_operators() as counts:
        step()
    assert counts.syncs == {name: 1}
    (place,) = counts.places
    assert "test_testing.py" in place and "<lambda>" in place


@pytest.mark.parametrize(
    "step, operators",
    [
        (lambda: X[ROWS] + 1, 2),
        (lambda: ROWS.repeat_interleave(ROWS, output_size=2), 2),
        (lambda: torch.where(X > 1, X, -X).sort(), 4),
        (lambda: X[:2], 1),
    ],
)
def test_the_rest_is_counted_as_operators_alone(step, operators):
    with count_operators() as counts:
        step()
    assert (counts.operators, counts.syncs) == (operators, {})


def test_backward_passes_are_counted_within_the_block_only():
    x = X.clone().requires_grad_()
    with count_operators() as counts:
        loss = x[x > 1].sum()
        forward = counts.operators
        loss.backward()
    assert counts.syncs["index"] == 1 and sum(counts.syncs.values()) == 2
    assert counts.operators > forward > 0
    X.tolist()
    assert "tolist" not in counts.syncs
