"""Hybrid Task Cascade against a second implementation, stage by stage, on weights that come from a
file with MMDetection's names. The reference follows the paper and MMDetection 2.x's inference; it
works on that file in double precision."""

import math

import pytest
import torch
from torch.nn import functional as F

from d2ext.checkpoint import Checkpointer
from d2ext.projects.htc import add_htc_config
from d2ext.utils.testing import tiny_config

from detectron2.modeling import build_model
from detectron2.structures import Boxes

from tests.fidelity import reference as ref

BLOCKS = (3, 4, 6, 3)
K, C, LABELS = 3, 8, 7
SIZES = ((96, 128), (120, 76))
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PRE_NMS, POST_NMS, DETECTIONS = 80, 40, 12


def make_weights():
    """A narrow HTC R-50 under MMDetection's names, with values at which everything matters."""
    generator = torch.Generator().manual_seed(3)
    weights = {}

    def conv(name, out, inputs, size, bias=True, gain=2.0):
        fan = inputs * size * size
        weights[f"{name}.weight"] = torch.randn(
            out, inputs, size, size, generator=generator
        ) * math.sqrt(gain / fan)
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    def linear(name, out, inputs, gain=2.0):
        conv(name, out, inputs, 1, gain=gain)
        weights[f"{name}.weight"] = weights[f"{name}.weight"].flatten(1)

    def norm(name, channels, scale=1.0):
        weights[f"{name}.weight"] = scale * (1 + 0.2 * torch.randn(channels, generator=generator))
        weights[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=generator)
        weights[f"{name}.running_mean"] = 0.1 * torch.randn(channels, generator=generator)
        weights[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=generator)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(9)

    conv("backbone.conv1", 4, 3, 7, bias=False)
    norm("backbone.bn1", 4)
    inputs = 4
    for layer, count in enumerate(BLOCKS):
        mid, out = 2 * 2**layer, 8 * 2**layer
        for j in range(count):
            name = f"backbone.layer{layer + 1}.{j}"
            for i, (a, b, size) in enumerate([(mid, inputs, 1), (mid, mid, 3), (out, mid, 1)], 1):
                conv(f"{name}.conv{i}", a, b, size, bias=False)
                norm(f"{name}.bn{i}", a, 0.4 if i == 3 else 1.0)
            if j == 0:
                conv(f"{name}.downsample.0", out, inputs, 1, bias=False)
                norm(f"{name}.downsample.1", out)
            inputs = out
    for n in range(4):
        conv(f"neck.lateral_convs.{n}.conv", C, 8 * 2**n, 1, gain=0.02)
        conv(f"neck.fpn_convs.{n}.conv", C, C, 3, gain=1)
    conv("rpn_head.rpn_conv", C, C, 3)
    conv("rpn_head.rpn_cls", 3, C, 1)
    conv("rpn_head.rpn_reg", 12, C, 1, gain=0.2)
    for t in range(3):
        head, mask = f"roi_head.bbox_head.{t}", f"roi_head.mask_head.{t}"
        linear(f"{head}.shared_fcs.0", 16, C * 49)
        linear(f"{head}.shared_fcs.1", 16, 16)
        linear(f"{head}.fc_cls", K + 1, 16, gain=4)
        linear(f"{head}.fc_reg", 4, 16, gain=2)
        for n in range(4):
            conv(f"{mask}.convs.{n}.conv", C, C, 3)
        conv(f"{mask}.upsample", C, C, 2)
        conv(f"{mask}.conv_logits", K, C, 1, gain=4)
        if t:
            conv(f"{mask}.conv_res.conv", C, C, 1)
    semantic = "roi_head.semantic_head"
    for n in range(5):
        conv(f"{semantic}.lateral_convs.{n}.conv", C, C, 1, gain=1)
    for n in range(4):
        conv(f"{semantic}.convs.{n}.conv", C, C, 3)
    conv(f"{semantic}.conv_embedding.conv", C, C, 1)
    conv(f"{semantic}.conv_logits", LABELS, C, 1)
    return weights


class Reference:
    """The forward pass on one batch; every step reads the weights by MMDetection's names."""

    def __init__(self, weights):
        self.w = {k: v.double() for k, v in weights.items()}

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def bn(self, name):
        return tuple(
            self.w[f"{name}.{x}"] for x in ("weight", "bias", "running_mean", "running_var")
        )

    def batch(self, images):
        height = max(-(-x.shape[1] // 32) * 32 for x in images)
        width = max(-(-x.shape[2] // 32) * 32 for x in images)
        batch = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
        for row, image in zip(batch, images):
            for channel in range(3):
                value = (image[channel].double() - MEAN[channel]) / STD[channel]
                row[channel, : image.shape[1], : image.shape[2]] = value
        return batch

    def pyramid(self, x):
        layers = {"stem": (self.w["backbone.conv1.weight"], self.bn("backbone.bn1"))}
        for stage, count in enumerate(BLOCKS, start=2):
            for j in range(count):
                name = f"backbone.layer{stage - 1}.{j}"
                for i in (1, 2, 3):
                    weight = self.w[f"{name}.conv{i}.weight"]
                    layers[stage, j, i] = (weight, self.bn(f"{name}.bn{i}"))
                if j == 0:
                    weight = self.w[f"{name}.downsample.0.weight"]
                    layers[stage, j, "shortcut"] = (weight, self.bn(f"{name}.downsample.1"))
        stages = ref.resnet(layers, x, BLOCKS, stride_in_1x1=False)
        sums, above = [None] * 4, None
        for n in (3, 2, 1, 0):
            sums[n] = self.conv(f"neck.lateral_convs.{n}.conv", stages[n])
            if above is not None:
                sums[n] = sums[n] + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
            above = sums[n]
        levels = [self.conv(f"neck.fpn_convs.{n}.conv", s, padding=1) for n, s in enumerate(sums)]
        return [*levels, levels[3][:, :, ::2, ::2]]

    def proposals(self, levels, sizes):
        results = []
        for image, (height, width) in enumerate(sizes):
            boxes, scores = [], []
            for index, level in enumerate(levels):
                stride = 4 * 2**index
                x = self.conv("rpn_head.rpn_conv", level[image : image + 1], padding=1).relu()
                logits = self.conv("rpn_head.rpn_cls", x)[0]
                deltas = self.conv("rpn_head.rpn_reg", x)[0]
                rows = []
                for i in range(level.shape[2]):
                    for j in range(level.shape[3]):
                        for a, ratio in enumerate((0.5, 1.0, 2.0)):
                            side = 8 * stride
                            w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
                            cx, cy = j * stride, i * stride
                            anchor = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                            rows.append((anchor, logits[a, i, j], deltas[4 * a : 4 * a + 4, i, j]))
                order = sorted(range(len(rows)), key=lambda r: -rows[r][1].item())[:PRE_NMS]
                anchors = torch.tensor([rows[r][0] for r in order], dtype=torch.float64)
                delta = torch.stack([rows[r][2] for r in order])
                decoded = decode(anchors, delta, (1, 1, 1, 1), (height, width))
                size = decoded[:, 2:] - decoded[:, :2]
                valid = (size > 0).all(1).nonzero()[:, 0]
                score = torch.stack([rows[r][1] for r in order])[valid]
                kept = ref.greedy_nms(decoded[valid].numpy(), score.numpy(), 0.7)
                boxes.append(decoded[valid][kept])
                scores.append(score[kept])
            best = torch.cat(scores).argsort(descending=True)[:POST_NMS]
            results.append((torch.cat(boxes)[best], torch.cat(scores)[best]))
        return results

    def semantic(self, levels):
        name = "roi_head.semantic_head"
        total = 0
        for n, level in enumerate(levels):
            if n != 1:
                level = ref.resize_corners(level, *levels[1].shape[2:])
            total = total + self.conv(f"{name}.lateral_convs.{n}.conv", level).relu()
        for n in range(4):
            total = self.conv(f"{name}.convs.{n}.conv", total, padding=1).relu()
        embedding = self.conv(f"{name}.conv_embedding.conv", total).relu()
        return self.conv(f"{name}.conv_logits", total), embedding

    def region_features(self, levels, embedding, boxes, size):
        """Features of the boxes of one image from one level each, and the semantic ones (14)."""
        found = []
        for box in boxes:
            side = math.sqrt(max(float((box[2] - box[0]) * (box[3] - box[1])), 0))
            level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
            found.append(ref.roi_align(levels[level], box, size, 1 / (4 * 2**level)))
        extra = [ref.roi_align(embedding, box, 14, 1 / 8) for box in boxes]
        return torch.stack(found), torch.stack(extra)

    def box_stage(self, t, levels, embedding, boxes, size):
        x, extra = self.region_features(levels, embedding, boxes, 7)
        x = x + extra.unflatten(3, (7, 2)).unflatten(2, (7, 2)).mean((3, 5))
        name = f"roi_head.bbox_head.{t}"
        x = self.linear(f"{name}.shared_fcs.0", x.flatten(1)).relu()
        x = self.linear(f"{name}.shared_fcs.1", x).relu()
        logits, deltas = self.linear(f"{name}.fc_cls", x), self.linear(f"{name}.fc_reg", x)
        return logits, deltas, decode(boxes, deltas, STDS[t], size)

    def masks(self, levels, embedding, boxes, classes):
        x, extra = self.region_features(levels, embedding, boxes, 14)
        x, before, total = x + extra, None, 0
        for t in range(3):
            name, h = f"roi_head.mask_head.{t}", x
            if before is not None:
                h = x + self.conv(f"{name}.conv_res.conv", before).relu()
            for n in range(4):
                h = self.conv(f"{name}.convs.{n}.conv", h, padding=1).relu()
            before = h
            weight, bias = self.w[f"{name}.upsample.weight"], self.w[f"{name}.upsample.bias"]
            # Each input pixel becomes a block of 2x2 pixels that no other one touches.
            up = torch.einsum("nchw,cdij->ndhiwj", h, weight).flatten(4, 5).flatten(2, 3)
            up = (up + bias[:, None, None]).relu()
            logits = self.conv(f"{name}.conv_logits", up)
            total = total + 1 / (1 + torch.exp(-logits[torch.arange(len(boxes)), classes]))
        return total / 3


def decode(boxes, deltas, std, size):
    dx, dy, dw, dh = (deltas * torch.tensor(std, dtype=torch.float64)).unbind(1)
    limit = math.log(1000 / 16)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    cx, cy = boxes[:, 0] + w / 2 + dx * w, boxes[:, 1] + h / 2 + dy * h
    w, h = w * dw.clamp(-limit, limit).exp(), h * dh.clamp(-limit, limit).exp()
    x1, x2 = ((cx + sign * w / 2).clamp(0, size[1]) for sign in (-1, 1))
    y1, y2 = ((cy + sign * h / 2).clamp(0, size[0]) for sign in (-1, 1))
    return torch.stack([x1, y1, x2, y2], 1)


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(5)
    return [
        {"image": torch.randint(256, (3, h, w), generator=generator, dtype=torch.uint8)}
        for h, w in SIZES
    ]


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    """The network with the settings of a stranger; the file brings the right ones."""
    path = tmp_path_factory.mktemp("htc") / "htc.pth"
    torch.save({"meta": {"CLASSES": ("a", "b", "c")}, "state_dict": weights}, path)
    cfg = tiny_config(add_htc_config)
    cfg.MODEL.META_ARCHITECTURE = "HybridTaskCascade"
    cfg.MODEL.BACKBONE.NAME = "build_deform_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.NORM = "EvalStatsBN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 2
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "InsideAnchorRPN"
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = PRE_NMS, POST_NMS
    cfg.MODEL.ROI_HEADS.NAME = "HTCROIHeads"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.001
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_MASK_HEAD.NAME = "HTCMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
    cfg.MODEL.HTC.SEMANTIC.CONV_DIM = C
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = LABELS
    cfg.INPUT.FORMAT = "RGB"
    cfg.TEST.DETECTIONS_PER_IMAGE = DETECTIONS
    model = build_model(cfg).eval()
    Checkpointer(model).load_complete(str(path))
    return model


@pytest.fixture(scope="module")
def stages(weights, inputs):
    """All outputs of the reference."""
    reference, out = Reference(weights), {}
    out["levels"] = reference.pyramid(reference.batch([x["image"] for x in inputs]))
    out["proposals"] = reference.proposals(out["levels"], SIZES)
    out["semantic"] = reference.semantic(out["levels"])
    out["stages"], out["results"] = [], []
    embedding = out["semantic"][1]
    for image, size in enumerate(SIZES):
        levels = [level[image] for level in out["levels"]]
        boxes, runs = out["proposals"][image][0], []
        for t in range(3):
            runs.append(reference.box_stage(t, levels, embedding[image], boxes, size))
            boxes = runs[-1][2]
        out["stages"].append(runs)
        scores = torch.softmax(sum(r[0] for r in runs) / 3, dim=1)
        found = []
        for k in range(K):
            rows = (scores[:, k] > 0.001).nonzero()[:, 0]
            kept = ref.greedy_nms(boxes[rows].numpy(), scores[rows, k].numpy(), 0.5)
            found += [(scores[rows[i], k].item(), k, rows[i].item()) for i in kept]
        found = sorted(found, key=lambda x: -x[0])[:DETECTIONS]
        rows, classes = (torch.tensor([x[i] for x in found]) for i in (2, 1))
        masks = reference.masks(levels, embedding[image], boxes[rows], classes)
        out["results"].append((boxes[rows], torch.tensor([x[0] for x in found]), classes, masks))
    return out


@torch.no_grad()
def features_of(model, inputs):
    images = model.preprocess_image(inputs)
    return images, model.backbone(images.tensor)


def test_the_pyramid_is_equal(model, inputs, stages):
    _, features = features_of(model, inputs)
    for name, expected in zip(("p2", "p3", "p4", "p5", "p6"), stages["levels"]):
        ref.assert_near(features[name], expected)


def test_the_proposals_are_equal(model, inputs, stages):
    images, features = features_of(model, inputs)
    with torch.no_grad():
        proposals, _ = model.proposal_generator(images, features, None)
    for found, (boxes, logits) in zip(proposals, stages["proposals"]):
        ref.assert_near(found.proposal_boxes.tensor, boxes)
        ref.assert_near(found.objectness_logits, logits)


def test_the_semantic_branch_is_equal(model, inputs, stages):
    _, features = features_of(model, inputs)
    head = model.roi_heads.semantic_head
    with torch.no_grad():
        shared, embedding = head(features)
        ref.assert_near(head.logits(shared), stages["semantic"][0])
    ref.assert_near(embedding, stages["semantic"][1])


@pytest.mark.parametrize("stage", range(3))
def test_every_box_stage_is_equal(model, inputs, stages, stage):
    _, features = features_of(model, inputs)
    heads = model.roi_heads
    before = [
        (runs[stage - 1][2] if stage else stages["proposals"][i][0]).float()
        for i, runs in enumerate(stages["stages"])
    ]
    boxes = [Boxes(x) for x in before]
    with torch.no_grad():
        features = heads.region_features(features)
        logits, deltas = heads.run_stage(features, boxes, stage)
        refined = heads.refine(boxes, (logits, deltas), list(SIZES), stage)
    ref.assert_near(logits, torch.cat([runs[stage][0] for runs in stages["stages"]]))
    ref.assert_near(deltas, torch.cat([runs[stage][1] for runs in stages["stages"]]))
    for found, runs in zip(refined, stages["stages"]):
        ref.assert_near(found.tensor, runs[stage][2])


def test_detections_and_their_masks_are_equal(model, inputs, stages):
    with torch.no_grad():
        results = model.inference(inputs, do_postprocess=False)
    for found, (boxes, scores, classes, masks) in zip(results, stages["results"]):
        assert len(found) == DETECTIONS
        assert found.pred_classes.tolist() == classes.tolist()
        ref.assert_near(found.scores, scores)
        ref.assert_near(found.pred_boxes.tensor, boxes)
        ref.assert_near(found.pred_masks[:, 0], masks)
        assert 0.1 < (masks > 0.5).double().mean() < 0.9  # masks with something in them


def test_every_mask_head_counts(model, inputs, stages):
    """The comparison of masks would notice if only the last head were used."""
    heads = model.roi_heads
    heads.mask_ensemble = "last"
    try:
        with torch.no_grad():
            results = model.inference(inputs, do_postprocess=False)
    finally:
        heads.mask_ensemble = "mean"
    for found, (*_, masks) in zip(results, stages["results"]):
        assert (found.pred_masks[:, 0] - masks).abs().max() > 0.01
