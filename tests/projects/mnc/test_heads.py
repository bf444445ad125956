import pytest
import torch

from d2ext.projects.mnc import MNCCategoryHead, MNCMaskHead, MNCRes5CategoryHead

from detectron2.layers import ShapeSpec

SHAPE = ShapeSpec(channels=6, height=4, width=4)


@pytest.fixture(params=["fc", "res5"])
def head(request):
    torch.manual_seed(0)
    if request.param == "fc":
        return MNCCategoryHead(SHAPE, num_classes=3, fc_dim=10)
    return MNCRes5CategoryHead(
        SHAPE, num_classes=3, bottleneck_channels=4, out_channels=8, norm="BN"
    ).eval()


def test_mask_head_has_no_convolution_and_rows_come_first():
    head = MNCMaskHead(SHAPE, fc_dim=5, mask_size=3)
    torch.nn.init.normal_(head.fc2.weight)
    x = torch.rand(2, 6, 4, 4)
    logits = head(x)
    assert logits.shape == (2, 1, 3, 3)
    flat = head.fc2(torch.relu(head.fc1(x.flatten(1))))
    assert logits[1, 0, 0].equal(flat[1, :3]) and logits[1, 0, 2].equal(flat[1, 6:])
    assert set(dict(head.named_children())) == {"fc1", "fc2"}


def test_outputs_join_the_mask_path_and_the_box_path_in_this_order(head):
    x, masks = torch.rand(3, 6, 4, 4), torch.rand(3, 1, 4, 4)
    found = head(x, masks)
    assert [tuple(o.shape) for o in found] == [(3, 4), (3, 4), (3, 12)]
    mask, box = head.paths(x, x * masks)
    joined = torch.cat([mask, box], dim=1)
    torch.testing.assert_close(found.cls_logits, head.cls_score(joined))
    torch.testing.assert_close(found.seg_logits, head.seg_cls_score(joined))
    torch.testing.assert_close(found.deltas, head.bbox_pred(joined))


def test_masks_reach_the_mask_path_only(head):
    x = torch.rand(2, 6, 4, 4)
    full, half = head.paths(x, x), head.paths(x, 0.5 * x)
    assert full[1].equal(half[1]) and not full[0].equal(half[0])
    with torch.no_grad():  # with equal weights the paths of a full mask agree
        head.load_state_dict({k: v for k, v in head.state_dict().items() if "mask" not in k})
    full = head.paths(x, x)
    torch.testing.assert_close(full[0], full[1])


def test_mask_path_starts_from_the_weights_of_the_box_path_unless_it_has_its_own(head):
    own = {k: v.clone() for k, v in head.state_dict().items()}
    before = {k: v for k, v in own.items() if "mask" not in k}
    result = head.load_state_dict(before)
    assert not result.missing_keys and not result.unexpected_keys
    for mask, box in head.twins.items():
        for key, value in getattr(head, box).state_dict().items():
            assert getattr(head, mask).state_dict()[key].equal(value)
    head.load_state_dict(own)
    assert all(head.state_dict()[k].equal(v) for k, v in own.items())


def test_no_box_gives_no_output(head):
    found = head(torch.zeros(0, 6, 4, 4), torch.zeros(0, 1, 7, 7))
    assert [tuple(o.shape) for o in found] == [(0, 4), (0, 4), (0, 12)]
    assert MNCMaskHead(SHAPE, mask_size=3)(torch.zeros(0, 6, 4, 4)).shape == (0, 1, 3, 3)
