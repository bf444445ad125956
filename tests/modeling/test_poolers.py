"""POOLER_TYPE in detectron2's own region heads: pyramid RoI align and the differentiable warp."""

import copy
import pickle

import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.errors import UserError
from d2ext.modeling import build_region_pooler
from d2ext.ops import PyramidROIAlignPooler, RoIWarpPooler, roi_warp
from d2ext.utils.testing import random_batch, tiny_config, training_losses

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def make_model(pooler_type, heads="StandardROIHeads", ratio=0):
    cfg = tiny_config()
    cfg.MODEL.ROI_HEADS.NAME = heads
    for branch in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        branch.POOLER_TYPE, branch.POOLER_SAMPLING_RATIO = pooler_type, ratio
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 5, 40 >> i, 56 >> i, generator=generator) for i in range(4)]


@pytest.fixture
def box_lists():
    boxes = [[3.0, 4.0, 90.0, 70.0], [0.0, 0.0, 219.0, 150.0], [10.0, 20.0, 700.0, 900.0]]
    return [Boxes(torch.tensor(boxes)), Boxes(torch.tensor(boxes[:1]) * 0.3 + 2)]


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_detectron2s_networks_train_and_predict_as_with_their_own_pooler(heads, ratio):
    ours, theirs = (make_model(name, heads, ratio) for name in ("PyramidROIAlign", "ROIAlignV2"))
    for model, kind in ((ours, PyramidROIAlignPooler), (theirs, ROIPooler)):
        assert type(model.roi_heads.box_pooler) is type(model.roi_heads.mask_pooler) is kind
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    batch = random_batch()
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        losses = training_losses(model, batch)
        sum(losses.values()).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            found = model.eval()(batch)[0]["instances"]
        results.append((losses, gradients, found.scores, found.pred_boxes.tensor))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_boxes_of_mask_rcnn_get_gradients_through_the_warp():
    batch = random_batch()
    boxes = [x["instances"].gt_boxes.tensor + 1.3 for x in batch]
    for name, moves in (("RoIWarp", True), ("ROIAlignV2", False)):
        model = make_model(name)
        heads = model.roi_heads
        assert isinstance(heads.box_pooler, RoIWarpPooler) == moves
        features = model.backbone(model.preprocess_image(batch).tensor)
        moving = [b.clone().requires_grad_() for b in boxes]
        for branch, pooler in (
            (heads.box_head, heads.box_pooler),
            (heads.mask_head, heads.mask_pooler),
        ):
            lists = [Boxes(b) for b in moving]
            pooled = pooler([features[f] for f in heads.in_features], lists)
            out = branch(pooled) if branch is heads.box_head else branch.layers(pooled)
            found = torch.autograd.grad(out.square().sum(), moving, allow_unused=True)
            assert all((g is not None and g.abs().sum() > 0) == moves for g in found)


def test_mask_rcnn_trains_with_the_warp():
    model = make_model("RoIWarp")
    losses = training_losses(model, random_batch())
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert model.backbone.fpn_output2.weight.grad.abs().sum() > 0
    assert len(model.eval()(random_batch())) == 2


def test_warp_reads_each_box_from_the_level_of_detectron2(features, box_lists):
    features = [f.double() for f in features]
    rows = torch.cat([b.tensor for b in box_lists])
    image = torch.tensor([0.0, 0, 0, 1])
    levels = assign_boxes_to_levels(box_lists, 2, 5, 224, 4)
    assert len(set(levels.tolist())) > 2
    expected = torch.cat([
        roi_warp(features[level], torch.cat([image[i, None], rows[i]])[None], 3, SCALES[level])
        for i, level in enumerate(levels.tolist())
    ])  # fmt: skip
    pooler = RoIWarpPooler(3, SCALES)
    assert torch.equal(pooler(features, box_lists), expected)
    moving = [b.tensor.double().requires_grad_() for b in box_lists]

    def run(*corners):
        return pooler(features, [Boxes64(c) for c in corners])

    assert torch.autograd.gradcheck(run, moving)


class Boxes64:
    """A box list in float64, which detectron2's `Boxes` rounds to float32."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_detectron2s_own_names_and_subclasses_are_left_alone(features, box_lists):
    class Mine(ROIPooler):
        pass

    assert type(Mine(3, SCALES, 0, "ROIAlignV2")) is Mine
    for name in ("ROIAlign", "ROIAlignV2", "ROIPool"):
        pooler = ROIPooler(output_size=3, scales=SCALES, sampling_ratio=0, pooler_type=name)
        assert type(pooler) is ROIPooler
        for other in (copy.deepcopy(pooler), pickle.loads(pickle.dumps(pooler))):
            assert torch.equal(other(features, box_lists), pooler(features, box_lists))
    with pytest.raises(ValueError, match="Unknown pooler type: Pyramid"):
        ROIPooler(3, SCALES, 0, "Pyramid")


def test_registered_poolers_take_every_argument_of_roi_pooler(features, box_lists):
    canonical = {"canonical_box_size": 60, "canonical_level": 3}
    theirs = ROIPooler(6, SCALES, 2, "ROIAlignV2", **canonical)(features, box_lists)
    plain = ROIPooler(6, SCALES, 2, "ROIAlignV2")(features, box_lists)
    assert not torch.allclose(theirs, plain)
    for arguments, options in (
        ((6, SCALES, 2, "PyramidROIAlign"), canonical),
        ((6, SCALES, 2, "PyramidROIAlign", 60, 3), {}),
        ((), {"output_size": 6, "scales": SCALES, "sampling_ratio": 2,
              "pooler_type": "PyramidROIAlign", **canonical}),
    ):  # fmt: skip
        pooler = ROIPooler(*arguments, **options)
        assert type(pooler) is PyramidROIAlignPooler and pooler.output_size == (6, 6)
        torch.testing.assert_close(pooler(features, box_lists), theirs, rtol=1e-5, atol=1e-5)
    warp = ROIPooler(6, SCALES, 0, "RoIWarp", **canonical)
    direct = RoIWarpPooler(6, SCALES, **canonical)
    assert torch.equal(warp(features, box_lists), direct(features, box_lists))


def test_warp_refuses_more_samples_than_it_takes():
    with pytest.raises(UserError, match="set POOLER_SAMPLING_RATIO to 0 or 1, not 2"):
        make_model("RoIWarp", ratio=2)


def test_one_function_builds_poolers_of_all_names(features, box_lists):
    kinds = {"ROIAlignV2": PyramidROIAlignPooler, "PyramidROIAlign": PyramidROIAlignPooler,
             "RoIWarp": RoIWarpPooler, "ROIAlign": ROIPooler}  # fmt: skip
    for name, kind in kinds.items():
        assert type(build_region_pooler(7, SCALES, 0, name)) is kind
    lazy = instantiate(L(build_region_pooler)(
        output_size=7, scales=SCALES, sampling_ratio=0, pooler_type="ROIAlignV2",
        canonical_box_size=100, canonical_level=3,
    ))  # fmt: skip
    theirs = ROIPooler(7, SCALES, 0, "ROIAlignV2", 100, 3)
    wanted = theirs(features, box_lists)
    torch.testing.assert_close(lazy(features, box_lists), wanted, rtol=1e-5, atol=1e-5)


def test_lazy_configs_written_for_roi_pooler_need_another_target_only(features, box_lists):
    config = L(ROIPooler)(
        output_size=7, scales=SCALES, sampling_ratio=0, pooler_type="ROIAlignV2"
    )  # fmt: skip
    wanted = instantiate(config)(features, box_lists)
    config._target_ = PyramidROIAlignPooler
    found = instantiate(config)(features, box_lists)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    config.pooler_type = "ROIAlign"
    with pytest.raises(ValueError, match="pooler_type 'ROIAlign' is none of"):
        instantiate(config)
