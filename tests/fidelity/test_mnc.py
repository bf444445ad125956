"""Multi-task Network Cascades against a second implementation: both passes and the voting, on
weights from a `.caffemodel` with the names of the authors' release. The reference follows the paper
and it: first and last pixels as corners, no -1 in the decoder, point-sampled RoI warping, voting on
continuous masks."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2ext.checkpoint import Checkpointer
from d2ext.config import get_cfg
from d2ext.projects.mnc import MultitaskNetworkCascade  # noqa: F401  registers the models

from detectron2.modeling import build_model
from detectron2.structures import Boxes

from tests.fidelity import reference as ref

LAYERS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
K, M, HIDDEN, MASK_HIDDEN = 3, 21, 16, 8
SCALES, PRE_NMS, POST_NMS = (2, 4, 8), 200, 30
SIZE, OUTPUT = (96, 128), (192, 256)  # of the network's input, and of the original image
MEAN = (102.9801, 115.9465, 122.7717)


def make_weights():
    """{layer: (weight, bias)}; box deltas are raw, as snapshots hold them."""
    rng = np.random.default_rng(4)
    weights = {}

    def add(name, *shape, gain=2.0):
        std = math.sqrt(gain / np.prod(shape[1:]))
        weight = rng.standard_normal(shape, np.float32) * np.float32(std)
        weights[name] = (weight, 0.1 * rng.standard_normal(shape[0], np.float32))

    inputs = 3
    for i, (width, count) in enumerate(LAYERS, start=1):
        for j in range(1, count + 1):
            add(f"conv{i}_{j}", width, inputs, 3, 3, gain=1e-4 if inputs == 3 else 2.0)
            inputs = width
    anchors = 3 * len(SCALES)
    add("rpn_conv_3x3", 512, 512, 3, 3)
    add("rpn_cls_score", 2 * anchors, 512, 1, 1)
    add("rpn_bbox_pred", 4 * anchors, 512, 1, 1, gain=0.2)
    add("fc6_maskest", MASK_HIDDEN, 512 * 14 * 14)
    add("mask_pred", M * M, MASK_HIDDEN, gain=4)
    for name, width in (("fc6", 512 * 49), ("fc7", HIDDEN)):
        add(name, HIDDEN, width)
        add(f"{name}_mask", HIDDEN, width, gain=8)
    add("cls_score", K + 1, 2 * HIDDEN)
    add("seg_cls_score", K + 1, 2 * HIDDEN, gain=8)
    add("bbox_pred", 4 * (K + 1), 2 * HIDDEN, gain=0.3)
    for array in weights["bbox_pred"]:
        array[:4] = 0  # the background's are not trained
    return weights


def caffemodel(weights):
    """The protocol buffer: repeated layers (100) with name (1) and blobs (7) of data and shape."""

    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def field(number, content):
        return varint(number << 3 | 2) + varint(len(content)) + content

    out = []
    for name, arrays in weights.items():
        layer = field(1, name.encode())
        for array in arrays:
            shape = field(1, b"".join(varint(n) for n in array.shape))
            layer += field(7, field(7, shape) + field(5, array.astype("<f4").tobytes()))
        out.append(field(100, layer))
    return b"".join(out)


def away(x):
    return math.copysign(math.floor(abs(x) + 0.5), x)


def warp(feature, roi):
    """512 x 14 x 14: points at the upper left corners of 28 x 28 parts, then maxima of 2 x 2."""
    height, width = feature.shape[1:]
    x1, y1, x2, y2 = (away(v / 16) for v in roi)

    def axis(first, last, n):
        position = first + np.arange(28) * max(last - first, 0) / 28
        valid = (position >= -0.5) & (position <= n - 0.5)
        position = position.clip(0, n - 1)
        low = np.floor(position).astype(int)
        return low, np.minimum(low + 1, n - 1), position - low, valid

    i, ii, a, v = axis(y1, y2, height)
    j, jj, b, u = axis(x1, x2, width)
    a = a[:, None]
    rows = feature[:, i] * (1 - a) + feature[:, ii] * a
    points = (rows[..., j] * (1 - b) + rows[..., jj] * b) * (v[:, None] & u)
    return points.reshape(len(feature), 14, 2, 14, 2).max(axis=(2, 4))


def shrink_mask(mask):
    """21 x 21 -> 14 x 14, sampled at 1.5 times the index."""
    position = np.arange(14) * M / 14
    low = np.floor(position).astype(int)
    f = position - low
    high = np.minimum(low + 1, M - 1)
    rows = mask[low] * (1 - f)[:, None] + mask[high] * f[:, None]
    return rows[:, low] * (1 - f) + rows[:, high] * f


def decode(boxes, deltas):
    size = boxes[:, 2:] - boxes[:, :2] + 1
    center = boxes[:, :2] + size / 2 + deltas[:, :2] * size
    half = size * np.exp(deltas[:, 2:]) / 2
    return np.concatenate([center - half, center + half], axis=1)


def clip(boxes, size):
    return np.clip(boxes, 0, np.array([size[1] - 1, size[0] - 1] * 2))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


class Reference:
    def __init__(self, weights):
        self.w = {k: tuple(x.astype(np.float64) for x in v) for k, v in weights.items()}

    def conv(self, name, x, padding=0):
        weight, bias = (torch.from_numpy(v) for v in self.w[name])
        return F.conv2d(x, weight, bias, padding=padding)

    def fc(self, name, x):
        weight, bias = self.w[name]
        return x @ weight.T + bias

    def features(self, image):
        x = torch.stack([image[c].double() - MEAN[c] for c in range(3)])[None]
        for i, (_, count) in enumerate(LAYERS, start=1):
            if i > 1:
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-math.inf)
                x = F.max_pool2d(x, 2)
            for j in range(1, count + 1):
                x = self.conv(f"conv{i}_{j}", x, 1).clamp(min=0)
        return x

    def proposals(self, feature):
        x = self.conv("rpn_conv_3x3", feature, 1).clamp(min=0)
        score = self.conv("rpn_cls_score", x)[0].numpy()
        delta = self.conv("rpn_bbox_pred", x)[0].numpy()
        base, boxes, scores = [], [], []
        for ratio in (0.5, 1, 2):
            w = round(math.sqrt(256 / ratio))
            h = round(w * ratio)
            for s in SCALES:
                half = np.array([w * s - 1, h * s - 1]) / 2
                base.append(np.concatenate([7.5 - half, 7.5 + half]))
        for i in range(score.shape[1]):
            for j in range(score.shape[2]):
                for a, anchor in enumerate(base):
                    shifted = anchor + 16 * np.array([j, i, j, i])
                    boxes.append(decode(shifted[None], delta[4 * a : 4 * a + 4, i, j][None])[0])
                    scores.append(score[len(base) + a, i, j] - score[a, i, j])
        boxes, scores = clip(np.array(boxes), SIZE), np.array(scores)
        smallest = 16 * SIZE[0] / OUTPUT[0]
        large = ((boxes[:, 2:] - boxes[:, :2] + 1) >= smallest).all(1)
        boxes, scores = boxes[large], scores[large]
        best = np.argsort(-scores, kind="stable")[:PRE_NMS]
        kept = ref.greedy_nms(boxes[best], scores[best], 0.7, 1.0)[:POST_NMS]
        return boxes[best][kept], scores[best][kept]

    def two_stages(self, feature, boxes):
        """Masks, box-level and mask-level class probabilities (background first), raw deltas."""
        x = np.stack([warp(feature, roi) for roi in boxes])
        hidden = self.fc("fc6_maskest", x.reshape(len(x), -1)).clip(min=0)
        masks = 1 / (1 + np.exp(-self.fc("mask_pred", hidden))).reshape(-1, M, M)
        gated = x * np.stack([shrink_mask(m) for m in masks])[:, None]

        def path(y, ending):
            y = y.reshape(*y.shape[:2], 7, 2, 7, 2).max(axis=(3, 5)).reshape(len(y), -1)
            y = self.fc(f"fc6{ending}", y).clip(min=0)
            return self.fc(f"fc7{ending}", y).clip(min=0)

        joined = np.concatenate([path(gated, "_mask"), path(x, "")], axis=1)
        classes = softmax(self.fc("cls_score", joined)), softmax(self.fc("seg_cls_score", joined))
        return masks, *classes, self.fc("bbox_pred", joined)


def bridge(boxes, probabilities, deltas):
    best = probabilities.argmax(axis=1)
    picked = np.stack([d[4 * k : 4 * k + 4] for d, k in zip(deltas, best)])
    return clip(decode(boxes, picked), SIZE)


def render(mask, box, size):
    """A mask in the image; its last row and column are not interpolated."""
    x1, y1, x2, y2 = box
    out = np.zeros(size)
    for y in range(max(math.ceil(y1), 0), min(math.floor(y2), size[0] - 1) + 1):
        v = (y - y1) * M / (y2 - y1 + 1)
        for x in range(max(math.ceil(x1), 0), min(math.floor(x2), size[1] - 1) + 1):
            out[y, x] = corner_sample(mask, v, (x - x1) * M / (x2 - x1 + 1))
    return out


def corner_sample(image, v, u):
    i, j = math.floor(v), math.floor(u)
    if i >= image.shape[0] - 1 or j >= image.shape[1] - 1:
        return image[min(i, image.shape[0] - 1), min(j, image.shape[1] - 1)]
    a, b = v - i, u - j
    top = image[i, j] * (1 - b) + image[i, j + 1] * b
    return top * (1 - a) + (image[i + 1, j] * (1 - b) + image[i + 1, j + 1] * b) * a


def vote(boxes, masks, probabilities):
    """(class from 0, score, box with its last pixel excluded, mask) of every instance."""
    seeds = []
    for c in range(1, K + 1):
        seeds += [(c, i) for i in ref.greedy_nms(boxes, probabilities[:, c], 0.3, 1.0)[:100]]
    ranked = sorted((probabilities[i, c] for c, i in seeds), reverse=True)
    least = ranked[min(len(ranked), 100) - 1]
    iou, results, drawn = ref.iou_matrix(boxes, boxes, 1.0), [], {}
    for c, i in seeds:
        if probabilities[i, c] < least:
            continue
        voters = [j for j in range(len(boxes)) if iou[i, j] >= 0.5]
        weight, total = sum(probabilities[j, c] for j in voters), np.zeros(OUTPUT)
        for j in voters:
            if j not in drawn:
                drawn[j] = render(masks[j], boxes[j], OUTPUT)
            total += probabilities[j, c] / weight * drawn[j]
        ys, xs = np.nonzero(total > 0.4)
        x1 = x2 = OUTPUT[1] // 2
        y1 = y2 = OUTPUT[0] // 2
        if len(ys):
            x1, y1, x2, y2 = xs.min(), ys.min(), xs.max(), ys.max()
        h, w = y2 - y1 + 1, x2 - x1 + 1
        cells = range(M)
        small = [
            [corner_sample(total, y1 + p * h / M, x1 + q * w / M) for q in cells] for p in cells
        ]
        mask = np.zeros(OUTPUT, bool)
        binary = (np.array(small) >= 0.4).astype(float)
        mask[y1 : y2 + 1, x1 : x2 + 1] = ref.resize_half_pixel(binary, h, w) >= 0.4
        results.append((c - 1, probabilities[i, c], (x1, y1, x2 + 1, y2 + 1), mask))
    return results


@pytest.fixture(scope="module")
def start(inputs):
    """Weights, feature map, proposals and their scores. The bias of the mask-level classifier is
    set such that every class, the background included, is the best one somewhere."""
    weights = make_weights()
    reference = Reference(weights)
    feature = reference.features(inputs[0]["image"])
    boxes, objectness = reference.proposals(feature)
    common = np.log(reference.two_stages(feature[0].numpy(), boxes)[2]).mean(axis=0)
    weight, bias = weights["seg_cls_score"]
    weights["seg_cls_score"] = (weight, (bias - common).astype(np.float32))
    return weights, feature, boxes, objectness


@pytest.fixture(scope="module")
def model(start, tmp_path_factory):
    path = tmp_path_factory.mktemp("mnc") / "mnc.caffemodel"
    path.write_bytes(caffemodel(start[0]))
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE = "MultitaskNetworkCascade"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_vgg16_backbone"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "DifferentiableRPN"
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 16
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    anchors.NAME, anchors.OFFSET = "RoundedAnchorGenerator", 0.5
    anchors.SIZES = [[16 * s for s in SCALES]]
    cfg.MODEL.CAFFE_RPN.SCALE_MIN_SIZE = True
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["conv5_3"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = PRE_NMS, POST_NMS
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "MNCROIHeads", K
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3, 0.0
    cfg.MODEL.MNC.MASK_FC_DIM, cfg.MODEL.MNC.FC_DIM = MASK_HIDDEN, HIDDEN
    model = build_model(cfg).eval()
    Checkpointer(model).load_complete(str(path))
    return model


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(8)
    coarse = torch.rand(1, 3, 6, 8, generator=generator) * 255
    image = F.interpolate(coarse, SIZE, mode="bilinear")[0].to(torch.uint8)
    return [{"image": image, "height": OUTPUT[0], "width": OUTPUT[1]}]


@pytest.fixture(scope="module")
def expected(start):
    """All outputs of the reference."""
    weights, feature, boxes, objectness = start
    reference = Reference(weights)
    out = {"conv5_3": feature, "boxes": boxes, "objectness": objectness}
    feature = feature[0].numpy()
    out["first"] = reference.two_stages(feature, out["boxes"])
    out["refined"] = bridge(out["boxes"], out["first"][2], out["first"][3])
    out["second"] = reference.two_stages(feature, out["refined"])
    boxes = clip(np.concatenate([out["boxes"], out["refined"]]) * 2, OUTPUT)
    masks = np.concatenate([out["first"][0], out["second"][0]])
    probabilities = np.concatenate([out["first"][2], out["second"][2]])
    out["instances"] = vote(boxes, masks, probabilities)
    return out


@pytest.fixture(scope="module")
def features(model, inputs):
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        return images, model.backbone(images.tensor)


def continuous(boxes):
    return Boxes(torch.from_numpy(boxes).float() + torch.tensor([0.0, 0, 1, 1]))


def inclusive(boxes):
    return boxes.tensor - torch.tensor([0.0, 0, 1, 1])


def test_the_features_are_equal(features, expected):
    ref.assert_near(features[1]["conv5_3"], expected["conv5_3"])


def test_the_proposals_are_equal(model, features, expected):
    images, maps = features
    rpn = model.proposal_generator
    with torch.no_grad():
        (found,) = rpn.propose(rpn.predict_anchors(maps), images.image_sizes, [SIZE[0] / OUTPUT[0]])
    assert len(found) == len(expected["boxes"]) > 10
    ref.assert_near(inclusive(found.proposal_boxes), expected["boxes"])
    ref.assert_near(found.objectness_logits, expected["objectness"])


@pytest.mark.parametrize("boxes, name", [("boxes", "first"), ("refined", "second")])
def test_two_stages_are_equal_in_both_passes(model, features, expected, boxes, name):
    heads = model.roi_heads
    with torch.no_grad():
        proposals = [continuous(expected[boxes])]
        x, logits = heads.run_mask_stage(features[1], proposals, name != "first")
        masks = logits.sigmoid()
        category = heads.category_head(x, masks)
    wanted = expected[name]
    ref.assert_near(masks[:, 0], wanted[0])
    for ours, theirs in ((category.cls_logits, wanted[1]), (category.seg_logits, wanted[2])):
        ref.assert_near(ours.softmax(1).roll(1, dims=1), theirs)
    weights = torch.tensor(heads.box_transform.weights).repeat(K)
    ref.assert_near(category.deltas / weights, wanted[3][:, 4:])


def test_the_bridge_is_equal_also_where_background_wins(model, features, expected):
    best = expected["first"][2].argmax(axis=1)
    assert (best == 0).any() and (best > 0).any()
    heads, boxes = model.roi_heads, [continuous(expected["boxes"])]
    with torch.no_grad():
        x, logits = heads.run_mask_stage(features[1], boxes)
        category = heads.category_head(x, logits.sigmoid())
        refined = heads.bridge(boxes, category, [SIZE])
    ref.assert_near(inclusive(Boxes(refined[0])), expected["refined"])


def test_the_candidates_are_equal(model, inputs, expected):
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)[0]
    boxes = np.concatenate([expected["boxes"], expected["refined"]])
    ref.assert_near(inclusive(found.pred_boxes), boxes)
    ref.assert_near(
        found.pred_masks[:, 0], np.concatenate([expected[x][0] for x in ("first", "second")])
    )
    scores = np.concatenate([expected[x][2] for x in ("first", "second")])
    ref.assert_near(found.class_scores, scores[:, 1:])


def test_the_instances_and_their_masks_are_equal(model, inputs, expected):
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
    assert len(found) == len(expected["instances"]) > 5
    wanted = sorted(expected["instances"], key=lambda x: (x[0], -x[1]))
    classes, scores, boxes, masks = zip(*wanted)
    own = np.lexsort([-found.scores.numpy(), found.pred_classes.numpy()])
    assert found.pred_classes[own].tolist() == list(classes)
    ref.assert_near(found.scores[own], scores)
    assert found.pred_boxes.tensor[own].tolist() == [list(map(float, b)) for b in boxes]
    different = (found.pred_masks[own].numpy() != np.array(masks)).mean()
    assert different < 1e-4 and 0.01 < np.mean(masks) < 0.9
