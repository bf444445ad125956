import pytest
import torch
from torch.nn import functional as F

from d2ext.modeling import (
    ClampedBox2BoxTransform,
    InsideAnchorRPN,
    ProposalSampler,
    SlimResNetFPN,
    build_region_pooler,
)
from d2ext.projects.htc import (
    FusedSemanticHead,
    HTCMaskHead,
    HTCROIHeads,
    HybridTaskCascade,
    add_htc_config,
)
from d2ext.utils.testing import random_batch, training_losses

from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers

from tests.projects.htc.helpers import make_config, make_model


def detections(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(batch)]


# --------------------------------------------------------------------------- parameter names


def names_of_mmdetections_r50_model():
    """Names and shapes, group by group, of the network that MMDetection released."""
    names = {}

    def layer(name, *shape, bias=True):
        names[f"{name}.weight"] = shape
        if bias:
            names[f"{name}.bias"] = (shape[1] if name.endswith("deconv") else shape[0],)

    def conv_bn(name, *shape):
        layer(name, *shape, bias=False)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            names[f"{name}.norm.{kind}"] = (shape[0],)

    conv_bn("backbone.bottom_up.stem.conv1", 64, 3, 7, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), start=2):
        for block in range(blocks):
            name = f"backbone.bottom_up.res{stage}.{block}"
            conv_bn(f"{name}.conv1", width, inputs, 1, 1)
            conv_bn(f"{name}.conv2", width, width, 3, 3)
            conv_bn(f"{name}.conv3", 4 * width, width, 1, 1)
            if block == 0:
                conv_bn(f"{name}.shortcut", 4 * width, inputs, 1, 1)
            inputs = 4 * width
        layer(f"backbone.fpn_lateral{stage}", 256, inputs, 1, 1)
        layer(f"backbone.fpn_output{stage}", 256, 256, 3, 3)
    layer("proposal_generator.rpn_head.conv", 256, 256, 3, 3)
    layer("proposal_generator.rpn_head.objectness_logits", 3, 256, 1, 1)
    layer("proposal_generator.rpn_head.anchor_deltas", 12, 256, 1, 1)
    for t in range(3):
        layer(f"roi_heads.box_head.{t}.fc1", 1024, 12544)
        layer(f"roi_heads.box_head.{t}.fc2", 1024, 1024)
        layer(f"roi_heads.box_predictor.{t}.cls_score", 81, 1024)
        layer(f"roi_heads.box_predictor.{t}.bbox_pred", 4, 1024)
        for n in range(1, 5):
            layer(f"roi_heads.mask_head.{t}.mask_fcn{n}", 256, 256, 3, 3)
        layer(f"roi_heads.mask_head.{t}.deconv", 256, 256, 2, 2)
        layer(f"roi_heads.mask_head.{t}.predictor", 80, 256, 1, 1)
        if t > 0:
            layer(f"roi_heads.mask_head.{t}.conv_res", 256, 256, 1, 1)
    for n in range(5):
        layer(f"roi_heads.semantic_head.lateral_convs.{n}", 256, 256, 1, 1)
    for n in range(4):
        layer(f"roi_heads.semantic_head.convs.{n}", 256, 256, 3, 3)
    layer("roi_heads.semantic_head.conv_embedding", 256, 256, 1, 1)
    layer("roi_heads.semantic_head.conv_logits", 183, 256, 1, 1)
    return names


@pytest.mark.parametrize(
    "backbone", ["build_resnet_fpn_backbone", "build_deform_resnet_fpn_backbone"]
)
def test_r50_model_has_the_373_tensors_of_the_released_one(backbone):
    cfg = make_config()
    model = cfg.MODEL
    model.BACKBONE.NAME = backbone
    model.RESNETS.NORM = "FrozenBN"
    model.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = model.HTC.SEMANTIC.CONV_DIM = model.ROI_MASK_HEAD.CONV_DIM = 256
    model.HTC.SEMANTIC.NUM_CONV = model.ROI_MASK_HEAD.NUM_CONV = 4
    model.ROI_BOX_HEAD.NUM_FC, model.ROI_BOX_HEAD.FC_DIM = 2, 1024
    model.ROI_HEADS.NUM_CLASSES, model.SEM_SEG_HEAD.NUM_CLASSES = 80, 183
    model.DEVICE = "meta"  # shapes without memory
    with torch.device("meta"):
        state = build_model(cfg).state_dict()
    expected = names_of_mmdetections_r50_model()
    assert len(expected) == 373
    assert {k: tuple(v.shape) for k, v in state.items()} == expected


# ------------------------------------------------------------------------------- construction


def lazy_model():
    def pooler(size, scales):
        return L(build_region_pooler)(
            output_size=size, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2"
        )

    levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    return L(HybridTaskCascade)(
        backbone=L(SlimResNetFPN)(
            stem_channels=8,
            stage_channels=[8, 16, 8, 16],
            stage_blocks=[1, 1, 1, 1],
            out_channels=8,
        ),
        proposal_generator=L(InsideAnchorRPN)(
            in_features=["p2", "p3", "p4", "p5", "p6"],
            head=L(StandardRPNHead)(in_channels=8, num_anchors=3),
            anchor_generator=L(DefaultAnchorGenerator)(
                sizes=[[16], [32], [64], [128], [256]],
                aspect_ratios=[0.5, 1.0, 2.0],
                strides=[4, 8, 16, 32, 64],
                offset=0.0,
            ),
            anchor_matcher=L(Matcher)(
                thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=False
            ),
            box2box_transform=L(ClampedBox2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_topk=(60, 60),
            post_nms_topk=(30, 30),
            nms_thresh=0.7,
            smooth_l1_beta=0.1111,
        ),
        roi_heads=L(HTCROIHeads)(
            num_classes=3,
            box_in_features=["p2", "p3", "p4", "p5"],
            box_pooler=pooler(7, levels),
            box_heads=[
                L(FastRCNNConvFCHead)(
                    input_shape=ShapeSpec(channels=8, height=7, width=7), conv_dims=[], fc_dims=[16]
                )
                for _ in range(3)
            ],
            box_predictors=[
                L(FastRCNNOutputLayers)(
                    input_shape=ShapeSpec(channels=16),
                    box2box_transform=L(ClampedBox2BoxTransform)(weights=[1 / s for s in std]),
                    num_classes=3,
                    cls_agnostic_bbox_reg=True,
                    smooth_l1_beta=1.0,
                    test_score_thresh=0.001,
                    test_topk_per_image=10,
                )
                for std in stds
            ],
            samplers=[
                L(ProposalSampler)(num_classes=3, iou_threshold=iou, reassign_low_quality=True)
                for iou in (0.5, 0.6, 0.7)
            ],
            mask_in_features=["p2", "p3", "p4", "p5"],
            mask_pooler=pooler(14, levels),
            mask_head=[
                L(HTCMaskHead)(
                    input_shape=ShapeSpec(channels=8, height=14, width=14),
                    num_classes=3,
                    conv_dims=[8, 8, 8],
                    information_flow=flow,
                )
                for flow in (False, True, True)
            ],
            semantic_head=L(FusedSemanticHead)(
                in_channels=8, conv_dim=8, num_conv=2, num_classes=7
            ),
            semantic_pooler=pooler(14, [1 / 8]),
        ),
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
        input_format="BGR",
    )


def test_yaml_and_lazy_build_the_same_model():
    yaml, lazy = make_model(), instantiate(lazy_model())
    lazy.load_state_dict(yaml.state_dict())
    batch = random_batch()
    a, b = training_losses(yaml, batch), training_losses(lazy, batch)
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    for x, y in zip(detections(yaml, batch), detections(lazy, batch)):
        assert torch.equal(x.scores, y.scores) and torch.equal(x.pred_masks, y.pred_masks)


def test_backbone_and_region_proposals_do_not_change_with_the_switches():
    full = set(make_model().state_dict())
    bare = set(make_model("HTC.SEMANTIC.ENABLED", False, "HTC.MASK_INFO_FLOW", False).state_dict())
    assert bare < full
    assert {n.split(".")[1] for n in full - bare} == {"semantic_head", "mask_head"}


# ----------------------------------------------------------------------------------- training


def test_a_step_gives_twelve_losses_and_a_gradient_for_every_parameter():
    model = make_model()
    losses = training_losses(model, random_batch())
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_semantic_seg"} | {
        f"loss_{kind}_stage{t}" for kind in ("cls", "box_reg", "mask") for t in range(3)
    }
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_a_batch_without_any_annotation_gives_every_parameter_a_gradient():
    model = make_model()
    batch = random_batch(num_objects=0)
    for x in batch:
        x["sem_seg"][:] = 255
    losses = training_losses(model, batch)
    sum(losses.values()).backward()
    assert losses["loss_semantic_seg"].item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_padding_of_the_label_maps_is_ignored():
    model = make_model().train()
    batch = random_batch(1, size=(64, 96)) + random_batch(1, size=(50, 70), seed=1)
    images = model.preprocess_image(batch)
    labels = model.semantic_labels(images, batch)
    assert images.tensor.shape == (2, 3, 64, 96) and labels.shape == (2, 64, 96)
    assert torch.equal(labels[0], batch[0]["sem_seg"])
    expected = F.pad(batch[1]["sem_seg"], (0, 26, 0, 14), value=255)
    assert torch.equal(labels[1], expected)


def test_semantic_loss_is_that_of_the_label_maps():
    model = make_model()
    batch = random_batch()
    loss = training_losses(model, batch)["loss_semantic_seg"].item()
    images = model.preprocess_image(batch)
    head = model.roi_heads.semantic_head
    logits = head.logits(head(model.backbone(images.tensor))[0])
    labels = torch.stack([x["sem_seg"] for x in batch])[:, ::8, ::8]
    assert loss == pytest.approx(0.2 * F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_losses_do_not_depend_on_the_order_of_the_batch():
    model = make_model("ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "RPN.BATCH_SIZE_PER_IMAGE", 16)
    batch = random_batch()
    a, b = training_losses(model, batch), training_losses(model, batch[::-1])
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-4, abs=1e-6), name


def test_missing_label_map_names_the_image_and_the_remedies():
    batch = random_batch()
    del batch[1]["sem_seg"]
    with pytest.raises(ValueError, match="image1.png.*MODEL.HTC.SEMANTIC.ENABLED False") as error:
        training_losses(make_model(), batch)
    assert "\n" not in str(error.value)


def test_label_map_of_another_size_is_reported():
    batch = random_batch()
    batch[0]["sem_seg"] = batch[0]["sem_seg"][:-1]
    with pytest.raises(ValueError, match="image0.png"):
        training_losses(make_model(), batch)


def test_label_maps_are_not_needed_without_semantic_branch():
    batch = random_batch()
    for x in batch:
        del x["sem_seg"]
    losses = training_losses(make_model("HTC.SEMANTIC.ENABLED", False), batch)
    assert "loss_semantic_seg" not in losses


def test_another_meta_architecture_is_told_to_change():
    model = make_model("META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE to HybridTaskCascade"):
        training_losses(model, random_batch())


# ---------------------------------------------------------------------------------- inference


def test_an_image_gives_the_same_result_alone_and_in_a_batch():
    model, batch = make_model(), random_batch(3)
    together = detections(model, batch)
    for x, expected in zip(batch, together):
        (alone,) = detections(model, [x])
        assert len(alone) == len(expected) > 0
        assert torch.allclose(alone.scores, expected.scores, atol=1e-5)
        assert torch.allclose(alone.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2)
        assert (alone.pred_masks != expected.pred_masks).float().mean() < 1e-3


def test_label_maps_and_objects_are_not_needed_for_inference():
    model, batch = make_model(), random_batch()
    bare = [{k: x[k] for k in ("image", "height", "width")} for x in batch]
    for a, b in zip(detections(model, batch), detections(model, bare)):
        assert torch.equal(a.scores, b.scores)


def test_results_are_scaled_to_the_requested_size():
    batch = random_batch(1)
    batch[0].update(height=32, width=48)
    model = make_model()
    (small,) = detections(model, batch)
    assert small.image_size == (32, 48) and small.pred_masks.shape[1:] == (32, 48)
    assert small.pred_boxes.tensor[:, 2].max() <= 48


def test_stage_results_improve_on_nothing_but_agree_in_the_end():
    model, batch = make_model(), random_batch()
    stages = model.eval().inference_stages(batch)
    final = detections(model, batch)
    assert len(stages) == 3
    for a, b in zip(stages[2], final):
        assert torch.equal(a["instances"].pred_masks, b.pred_masks)
    assert not torch.equal(stages[0][0]["instances"].scores, final[0].scores)


def test_default_predictor_runs_it():
    predictor = DefaultPredictor(make_config())
    image = random_batch(1)[0]["image"].permute(1, 2, 0).numpy()
    predictor.aug.short_edge_length = [64, 64]
    instances = predictor(image)["instances"]
    assert instances.image_size == (64, 96) and len(instances) == 10
    assert instances.pred_masks.shape == (10, 64, 96)


def test_detectron2s_test_time_augmentation_runs_it():
    cfg = make_config()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (48, 64), 128
    model = make_model().eval()
    image = {k: v for k, v in random_batch(1)[0].items() if k in ("image", "height", "width")}
    with torch.no_grad():
        (result,) = GeneralizedRCNNWithTTA(cfg, model)([image])
    assert result["instances"].pred_masks.shape == (10, 64, 96)
    assert model.roi_heads.mask_on


def test_registration_needs_no_more_than_the_import():
    cfg = get_cfg()
    add_htc_config(cfg)
    from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY

    assert META_ARCH_REGISTRY.get("HybridTaskCascade") is HybridTaskCascade
    assert ROI_HEADS_REGISTRY.get("HTCROIHeads") is HTCROIHeads
    assert ROI_MASK_HEAD_REGISTRY.get("HTCMaskHead") is HTCMaskHead


def test_semantic_loss_can_be_divided_by_ignored_pixels_too():
    batch = random_batch()
    for x in batch:
        x["sem_seg"][:, :48] = 255  # half of every image
    name = "loss_semantic_seg"
    plain = training_losses(make_model(), batch)[name]
    halved = training_losses(make_model("HTC.SEMANTIC.MEAN_OVER_ALL_PIXELS", True), batch)[name]
    assert halved.item() == pytest.approx(plain.item() / 2, rel=1e-5)


@pytest.mark.parametrize("reassign, row", [(True, 1), (False, 0)])
def test_low_quality_matches_can_be_left_to_the_better_object(reassign, row):
    boxes, objects = (
        torch.tensor([[0.0, 0, 20, 20]]),
        torch.tensor([[0.0, 0, 20, 18], [0, 0, 20, 15]]),
    )
    heads = make_model("HTC.REASSIGN_LOW_QUALITY", reassign).roi_heads
    for sampler in heads.samplers:
        assert sampler.assign(boxes, objects)[0].tolist() == [row]
