"""FCIS against a second implementation, from pixels to pasted masks, on weights that come from a
`.params` file with the names of the authors' release. The reference follows the paper and that
release: first and last pixels as corners, rounding, means over whole cells in single precision, and
mask voting on the CPU of numpy."""

import math
import struct

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2ext.checkpoint import Checkpointer
from d2ext.config import get_cfg
from d2ext.projects.fcis import FCIS  # noqa: F401  registers the models

from detectron2.modeling import build_model
from detectron2.structures import Boxes

from tests.fidelity import reference as ref

BLOCKS = (3, 4, 6, 3)
SUFFIXES = ("abc", "abcd", "abcdef", "abc")
K, PARTS, CELLS, WIDTH = 3, 7, 21, 16
SCALES, PRE_NMS, POST_NMS = (2, 4), 150, 25
SIZE, OUTPUT = (113, 150), (226, 300)  # of the network's input, and of the original image
STDS = (0.2, 0.2, 0.5, 0.5)
MEAN = (123.15, 115.9, 103.06)


def make_weights():
    rng = np.random.default_rng(11)
    weights = {}

    def conv(name, out, inputs, size, bias=True, gain=2.0):
        std = math.sqrt(gain / (inputs * size * size))
        weights[f"arg:{name}_weight"] = rng.normal(0, std, (out, inputs, size, size))
        if bias:
            weights[f"arg:{name}_bias"] = rng.normal(0, 0.1, out)

    def norm(name, channels, scale=1.0):
        weights[f"arg:{name}_gamma"] = scale * (1 + rng.normal(0, 0.2, channels))
        weights[f"arg:{name}_beta"] = rng.normal(0, 0.1, channels)
        weights[f"aux:{name}_moving_mean"] = rng.normal(0, 0.1, channels)
        weights[f"aux:{name}_moving_var"] = 0.5 + rng.random(channels)

    conv("conv1", 4, 3, 7, bias=False, gain=0.002)
    norm("bn_conv1", 4)
    inputs = 4
    for stage, suffixes in enumerate(SUFFIXES, start=2):
        mid = 2 ** (stage - 1)
        for j, suffix in enumerate(suffixes):
            branches = [("2a", mid, inputs, 1), ("2b", mid, mid, 3), ("2c", 4 * mid, mid, 1)]
            if j == 0:
                branches.append(("1", 4 * mid, inputs, 1))
            for branch, out, before, size in branches:
                conv(f"res{stage}{suffix}_branch{branch}", out, before, size, bias=False)
                norm(f"bn{stage}{suffix}_branch{branch}", out, 0.4 if branch == "2c" else 1.0)
            inputs = 4 * mid
    anchors = 3 * len(SCALES)
    conv("rpn_conv_3x3", WIDTH, 32, 3)
    conv("rpn_cls_score", 2 * anchors, WIDTH, 1, gain=0.05)
    conv("rpn_bbox_pred", 4 * anchors, WIDTH, 1, gain=0.005)
    conv("conv_new_1", WIDTH, 64, 1)
    conv("fcis_cls_seg", 2 * (K + 1) * PARTS**2, WIDTH, 1, gain=4)
    conv("fcis_bbox", 8 * PARTS**2, WIDTH, 1, gain=1)
    return {k: v.astype(np.float32) for k, v in weights.items()}


def params_file(weights):
    """The list of arrays as MXNet wrote it before it had magic numbers."""
    out = [struct.pack("<3Q", 0x112, 0, len(weights))]
    for value in weights.values():
        out.append(struct.pack(f"<{value.ndim + 1}I", value.ndim, *value.shape))
        out.append(struct.pack("<3i", 1, 0, 0) + value.tobytes())
    out.append(struct.pack("<Q", len(weights)))
    out += [struct.pack("<Q", len(name)) + name.encode() for name in weights]
    return b"".join(out)


class Reference:
    """The forward pass on one image; boxes are first and last pixels throughout."""

    def __init__(self, weights):
        self.w = {k: torch.from_numpy(v).double() for k, v in weights.items()}

    def conv(self, name, x, padding=0):
        weight, bias = self.w[f"arg:{name}_weight"], self.w[f"arg:{name}_bias"]
        return F.conv2d(x, weight, bias, padding=padding)

    def features(self, image):
        def layer(conv, norm):
            names = ("arg:{}_gamma", "arg:{}_beta", "aux:{}_moving_mean", "aux:{}_moving_var")
            return self.w[f"arg:{conv}_weight"], tuple(self.w[x.format(norm)] for x in names)

        layers = {"stem": layer("conv1", "bn_conv1")}
        for stage, suffixes in enumerate(SUFFIXES, start=2):
            for j, suffix in enumerate(suffixes):
                for i, branch in ((1, "2a"), (2, "2b"), (3, "2c"), ("shortcut", "1")):
                    if branch != "1" or j == 0:
                        name = f"{stage}{suffix}_branch{branch}"
                        layers[stage, j, i] = layer(f"res{name}", f"bn{name}")
        x = torch.stack([image[c].double() - MEAN[c] for c in range(3)])[None]
        return ref.resnet(
            layers, x, BLOCKS, stride_in_1x1=True, dilated_res5=True, caffe_pool=True
        )[2:]

    def proposals(self, res4):
        x = self.conv("rpn_conv_3x3", res4, 1).relu()
        score = self.conv("rpn_cls_score", x)[0].numpy()
        delta = self.conv("rpn_bbox_pred", x)[0].numpy()
        count, boxes, scores = 3 * len(SCALES), [], []
        for i in range(SIZE[0] // 16):
            for j in range(SIZE[1] // 16):
                for a, anchor in enumerate(base_anchors()):
                    shifted = anchor + 16 * np.array([j, i, j, i])
                    boxes.append(decode(shifted[None], delta[4 * a : 4 * a + 4, i, j][None])[0])
                    background, foreground = score[a, i, j], score[count + a, i, j]
                    scores.append(1 / (1 + math.exp(background - foreground)))
        boxes, scores = clip(np.array(boxes), SIZE), np.array(scores)
        large = ((boxes[:, 2:] - boxes[:, :2] + 1) >= 2).all(1)
        boxes, scores = boxes[large], scores[large]
        best = np.argsort(-scores, kind="stable")[:PRE_NMS]
        kept = ref.greedy_nms(boxes[best], scores[best], 0.7, 1.0)[:POST_NMS]
        return boxes[best][kept], scores[best][kept]

    def score_maps(self, res5):
        x = self.conv("conv_new_1", res5).relu()
        return self.conv("fcis_cls_seg", x)[0].numpy(), self.conv("fcis_bbox", x)[0].numpy()

    def heads(self, maps, boxes):
        """Class probabilities (R, K + 1) with the background first, masks of the best classes
        (R, 21, 21), raw box deltas (R, 4)."""
        score, box = maps
        probabilities, masks, deltas = [], [], []
        for roi in boxes:
            cells = assemble(score, roi).reshape(K + 1, 2, CELLS, CELLS)
            logits = cells.max(axis=1).mean(axis=(1, 2))
            p = np.exp(logits - logits.max())
            probabilities.append(p / p.sum())
            best = 1 + int(np.argmax(probabilities[-1][1:]))
            masks.append(1 / (1 + np.exp(cells[best, 0] - cells[best, 1])))
            moved = assemble(box, roi).mean(axis=(1, 2))
            deltas.append(moved[4:] * STDS)
        return np.array(probabilities), np.array(masks), np.array(deltas)


def base_anchors():
    boxes = []
    for ratio in (0.5, 1, 2):
        w = round(math.sqrt(256 / ratio))
        h = round(w * ratio)
        for s in SCALES:
            half_w, half_h = (w * s - 1) / 2, (h * s - 1) / 2
            boxes.append([7.5 - half_w, 7.5 - half_h, 7.5 + half_w, 7.5 + half_h])
    return np.array(boxes)


def decode(boxes, deltas):
    size = boxes[:, 2:] - boxes[:, :2] + 1
    center = boxes[:, :2] + (size - 1) / 2 + deltas[:, :2] * size
    half = (size * np.exp(deltas[:, 2:]) - 1) / 2
    return np.concatenate([center - half, center + half], axis=1)


def clip(boxes, size):
    last = np.array([size[1] - 1, size[0] - 1] * 2)
    return np.clip(boxes, 0, last)


def assemble(maps, roi):
    """Means over the cells that the 21 x 21 parts of a region touch, each part of its own map."""
    f = np.float32

    def axis(first, last, n):
        away = [math.copysign(math.floor(abs(v) + 0.5), v) for v in (first, last)]
        start, end = f(away[0] * 0.0625), f((away[1] + 1) * 0.0625)
        step = f(max(f(end - start), f(0.1)) / f(CELLS))
        ranges = []
        for p in range(CELLS):
            low = math.floor(f(f(f(p) * step) + start))
            high = math.ceil(f(f(f(p + 1) * step) + start))
            ranges.append((min(max(low, 0), n), min(max(high, 0), n), p * PARTS // CELLS))
        return ranges

    # The corners come in single precision from the network before.
    x1, y1, x2, y2 = (float(f(v)) for v in roi)
    rows, columns = axis(y1, y2, maps.shape[1]), axis(x1, x2, maps.shape[2])
    parts = maps.reshape(-1, PARTS, PARTS, *maps.shape[1:])
    out = np.zeros((len(parts), CELLS, CELLS))
    for i, (top, bottom, row) in enumerate(rows):
        for j, (left, right, column) in enumerate(columns):
            if top < bottom and left < right:
                out[:, i, j] = parts[:, row, column, top:bottom, left:right].mean(axis=(1, 2))
    return out


def vote(boxes, probabilities, masks, size):
    """(class from 0, score, tight box, pasted mask) of every detection of an image."""
    height, width = size
    seeds = []
    for c in range(1, K + 1):
        kept = ref.greedy_nms(boxes, probabilities[:, c], 0.3, 1.0)[:100]
        seeds += [(c, i) for i in kept]
    ranked = sorted((probabilities[i, c] for c, i in seeds), reverse=True)
    least = max(ranked[min(len(ranked), 100) - 1], 1e-3)
    iou, results = ref.iou_matrix(boxes, boxes, 1.0), []
    rounded = np.round(boxes).astype(int)
    for c, i in seeds:
        if probabilities[i, c] < least:
            continue
        voters = [j for j in range(len(boxes)) if iou[i, j] >= 0.5]
        total = np.zeros(size)
        weight = sum(probabilities[j, c] for j in voters)
        for j in voters:
            x1, y1, x2, y2 = rounded[j]
            drawn = ref.resize_half_pixel(masks[j], y2 - y1 + 1, x2 - x1 + 1) >= 0.4
            total[y1 : y2 + 1, x1 : x2 + 1] += probabilities[j, c] / weight * drawn
        ys, xs = np.nonzero(total >= 0.4 - 1e-9)
        if not len(ys):
            continue
        x1, y1, x2, y2 = xs.min(), ys.min(), xs.max(), ys.max()
        if x2 <= x1 or y2 <= y1:
            continue
        # Samples of the whole image: for boxes of fewer pixels than cells, also beside the box.
        small = np.zeros((CELLS, CELLS))
        for a in range(CELLS):
            v = y1 + (a + 0.5) * (y2 - y1 + 1) / CELLS - 0.5
            for b in range(CELLS):
                u = x1 + (b + 0.5) * (x2 - x1 + 1) / CELLS - 0.5
                small[a, b] = sample(total, v, u)
        mask = np.zeros(size, bool)
        mask[y1 : y2 + 1, x1 : x2 + 1] = (
            ref.resize_half_pixel(small, y2 - y1 + 1, x2 - x1 + 1) >= 0.4
        )
        results.append((c - 1, probabilities[i, c], (x1, y1, x2 + 1, y2 + 1), mask))
    return results


def sample(image, v, u):
    v, u = min(max(v, 0), image.shape[0] - 1), min(max(u, 0), image.shape[1] - 1)
    i, j = math.floor(v), math.floor(u)
    ii, jj = min(i + 1, image.shape[0] - 1), min(j + 1, image.shape[1] - 1)
    a, b = v - i, u - j
    top = image[i, j] * (1 - b) + image[i, jj] * b
    return top * (1 - a) + (image[ii, j] * (1 - b) + image[ii, jj] * b) * a


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(1, 3, 8, 10, generator=generator) * 255
    return F.interpolate(coarse, SIZE, mode="bilinear")[0].to(torch.uint8)


def tiny_fcis(order):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE = "FCIS"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_caffe_resnet_backbone"
    resnet = cfg.MODEL.RESNETS
    resnet.DEPTH, resnet.STEM_OUT_CHANNELS, resnet.RES2_OUT_CHANNELS = 50, 4, 8
    resnet.WIDTH_PER_GROUP, resnet.NORM, resnet.RES5_DILATION = 2, "EvalStatsBN", 2
    resnet.STRIDE_IN_1X1 = False  # the importer knows better
    resnet.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = "CaffeRPN", 2
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    anchors.NAME, anchors.SIZES, anchors.OFFSET = "RoundedAnchorGenerator", [[32, 64]], 0.5
    rpn = cfg.MODEL.RPN
    rpn.IN_FEATURES, rpn.CONV_DIMS = ["res4"], [WIDTH]
    rpn.PRE_NMS_TOPK_TEST, rpn.POST_NMS_TOPK_TEST = PRE_NMS, POST_NMS
    heads = cfg.MODEL.ROI_HEADS
    heads.NAME, heads.NUM_CLASSES = "FCISROIHeads", K
    heads.NMS_THRESH_TEST, heads.SCORE_THRESH_TEST = 0.3, 0.001
    cfg.MODEL.FCIS.CONV_DIM = WIDTH
    cfg.INPUT.FORMAT = order
    return build_model(cfg).eval()


@pytest.fixture(scope="module", params=["RGB", "BGR"])
def model(request, weights, tmp_path_factory):
    """The network for images of either order, with the weights of the file."""
    path = tmp_path_factory.mktemp("fcis") / "fcis-0000.params"
    path.write_bytes(params_file(weights))
    model = tiny_fcis(request.param)
    Checkpointer(model).load_complete(str(path))
    return model


@pytest.fixture
def inputs(model, image):
    own = image if model.input_format == "RGB" else image.flip(0)
    return [{"image": own, "height": OUTPUT[0], "width": OUTPUT[1]}]


@pytest.fixture(scope="module")
def expected(weights, image):
    """All outputs of the reference."""
    reference, out = Reference(weights), {}
    out["res4"], out["res5"] = reference.features(image)
    out["boxes"], out["objectness"] = reference.proposals(out["res4"])
    out["maps"] = reference.score_maps(out["res5"])
    out["first"] = reference.heads(out["maps"], out["boxes"])
    out["refined"] = clip(decode(out["boxes"], out["first"][2]), SIZE)
    out["second"] = reference.heads(out["maps"], out["refined"])
    boxes = np.concatenate([out["boxes"], out["refined"]])
    pool = [np.concatenate(pair) for pair in zip(out["first"][:2], out["second"][:2])]
    large = ((boxes[:, 2:] - boxes[:, :2] + 1) >= 2).all(1)
    boxes, pool = boxes[large], [x[large] for x in pool]
    out["pool"] = (boxes, *pool)
    in_image = clip(boxes * 2, OUTPUT)
    out["detections"] = vote(in_image, *pool, OUTPUT)
    return out


@torch.no_grad()
def features_of(model, inputs):
    images = model.preprocess_image(inputs)
    return images, model.backbone(images.tensor)


def test_the_features_are_equal(model, inputs, expected):
    _, features = features_of(model, inputs)
    ref.assert_near(features["res4"], expected["res4"])
    ref.assert_near(features["res5"], expected["res5"])


def test_the_proposals_are_equal(model, inputs, expected):
    images, features = features_of(model, inputs)
    with torch.no_grad():
        found = model.proposal_generator(images, features, None)[0][0]
    assert len(found) == len(expected["boxes"]) > 10
    ref.assert_near(found.proposal_boxes.tensor - torch.tensor([0.0, 0, 1, 1]), expected["boxes"])
    ref.assert_near(found.objectness_logits.sigmoid(), expected["objectness"])


def test_the_heads_are_equal_in_both_passes(model, inputs, expected):
    heads = model.roi_heads
    _, features = features_of(model, inputs)
    maps = heads.score_maps(features)
    for boxes, name in ((expected["boxes"], "first"), (expected["refined"], "second")):
        continuous = Boxes(torch.from_numpy(boxes).float() + torch.tensor([0.0, 0, 1, 1]))
        with torch.no_grad():
            scores = heads.score_regions(maps, [continuous])
        probabilities, masks, deltas = expected[name]
        ours = scores.logits.softmax(1)
        ref.assert_near(ours[:, :K], probabilities[:, 1:])
        ref.assert_near(ours[:, K], probabilities[:, 0])
        ref.assert_near(scores.seg.softmax(1)[:, 1], masks)
        weights = torch.tensor(heads.box2box_transform.weights)
        ref.assert_near(scores.deltas / weights, deltas)


def test_the_candidates_of_both_passes_are_equal(model, inputs, expected):
    with torch.no_grad():
        pool = model.candidates(inputs)[0]
    boxes, probabilities, masks = expected["pool"]
    ref.assert_near(pool.pred_boxes.tensor - torch.tensor([0.0, 0, 1, 1]), boxes)
    ref.assert_near(pool.class_probs, probabilities[:, 1:])
    ref.assert_near(pool.pred_masks[:, 0], masks)


def test_the_detections_and_their_masks_are_equal(model, inputs, expected):
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
    detections = expected["detections"]
    assert len(found) == len(detections) > 5
    order = np.lexsort([[-d[1] for d in detections], [d[0] for d in detections]])
    classes, scores, boxes, masks = zip(*(detections[i] for i in order))
    own = np.lexsort([-found.scores.numpy(), found.pred_classes.numpy()])
    assert found.pred_classes[own].tolist() == list(classes)
    ref.assert_near(found.scores[own], scores)
    assert found.pred_boxes.tensor[own].tolist() == [list(map(float, b)) for b in boxes]
    different = (found.pred_masks[own].numpy() != np.array(masks)).mean()
    assert different < 1e-4 and 0.01 < np.mean(masks) < 0.9
