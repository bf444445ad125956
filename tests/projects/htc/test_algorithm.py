"""Training losses and detections against a transcription of the algorithm into plain PyTorch: box
by box, stage by stage, with torchvision's RoIAlign as the only operator in common."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

from d2ext.utils.testing import near_objects, random_batch

from detectron2.utils.events import EventStorage

from tests.projects.htc.helpers import STDS, make_model, pyramid

SIZE = (64, 96)
IOUS = (0.5, 0.6, 0.7)
WEIGHTS = (1.0, 0.5, 0.25)
K = 3


class Oracle:
    """The network and its training, from the weights of a model."""

    def __init__(self, model, features, embedding, stds):
        self.p = dict(model.roi_heads.named_parameters())
        self.features, self.embedding, self.stds = features, embedding, stds

    def conv(self, name, x, padding=0):
        return F.conv2d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], padding=padding)

    def linear(self, name, x):
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def pool(self, image, box, size):
        w, h = float(box[2] - box[0]), float(box[3] - box[1])
        level = math.floor(math.log2(math.sqrt(w * h) / 56 + 1e-6)) if w * h > 0 else 0
        level = min(max(level, 0), 3)
        fine = self.features[f"p{level + 2}"][image : image + 1]
        return roi_align(fine, [box[None]], size, 0.25 / 2**level, -1, True)

    def semantic(self, image, box):
        return roi_align(self.embedding[image : image + 1], [box[None]], 14, 1 / 8, -1, True)

    def box_head(self, stage, image, box):
        pooled = F.avg_pool2d(self.semantic(image, box), 2)
        x = (self.pool(image, box, 7) + pooled).flatten(1)
        x = F.relu(self.linear(f"box_head.{stage}.fc1", x))
        logits = self.linear(f"box_predictor.{stage}.cls_score", x)[0]
        return logits, self.linear(f"box_predictor.{stage}.bbox_pred", x)[0]

    def mask_logits(self, stage, image, box):
        """Logits of the heads up to a stage on the same region."""
        x = self.pool(image, box, 14) + self.semantic(image, box)
        h, logits = None, []
        for k in range(stage + 1):
            name = f"mask_head.{k}"
            z = x if h is None else x + F.relu(self.conv(f"{name}.conv_res", h))
            for n in (1, 2):
                z = F.relu(self.conv(f"{name}.mask_fcn{n}", z, padding=1))
            h = z
            weight, bias = self.p[f"{name}.deconv.weight"], self.p[f"{name}.deconv.bias"]
            up = F.relu(F.conv_transpose2d(h, weight, bias, stride=2))
            logits.append(self.conv(f"{name}.predictor", up)[0])
        return logits

    def decode(self, stage, box, delta):
        dx, dy, dw, dh = delta.detach() * torch.tensor(self.stds[stage])
        limit = math.log(1000 / 16)
        w, h = box[2] - box[0], box[3] - box[1]
        cx, cy = (box[0] + box[2]) / 2 + dx * w, (box[1] + box[3]) / 2 + dy * h
        w, h = w * dw.clamp(-limit, limit).exp(), h * dh.clamp(-limit, limit).exp()
        x1, x2 = (cx - w / 2).clamp(0, SIZE[1]), (cx + w / 2).clamp(0, SIZE[1])
        y1, y2 = (cy - h / 2).clamp(0, SIZE[0]), (cy + h / 2).clamp(0, SIZE[0])
        return torch.stack([x1, y1, x2, y2])

    def encode(self, stage, box, gt):
        (w, h), (gw, gh) = box[2:] - box[:2], gt[2:] - gt[:2]
        (dx, dy) = ((gt[:2] + gt[2:]) - (box[:2] + box[2:])) / 2 / (box[2:] - box[:2])
        return torch.stack([dx, dy, (gw / w).log(), (gh / h).log()]) / torch.tensor(
            self.stds[stage]
        )


def iou(a, b):
    w = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    h = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return (w * h / (area - w * h)).item()


def sample(boxes, gts, threshold):
    """(box, row of its object or None, is an object itself), when everything may be sampled."""
    table = [[iou(box, gt) for gt in gts] for box in boxes]
    rows = [
        max(range(len(gts)), key=lambda g: values[g]) if max(values) >= threshold else None
        for values in table
    ]
    for g in range(len(gts)):
        best = max(values[g] for values in table)
        if best >= threshold:
            rows = [g if values[g] == best else row for row, values in zip(rows, table)]
    own = [(gt, g, True) for g, gt in enumerate(gts)]
    return own + [(box, row, False) for box, row in zip(boxes, rows)]


def smooth_l1(x):
    return torch.where(x.abs() < 1, 0.5 * x * x, x.abs() - 0.5).sum()


def losses_by_hand(oracle, batch, proposals, interleaved):
    losses = {}
    boxes = [list(p.proposal_boxes.tensor) for p in proposals]
    for stage in range(3):
        cls = reg = mask = 0.0
        count = positives = 0
        for image, x in enumerate(batch):
            target = x["instances"]
            gts = list(target.gt_boxes.tensor)
            samples = sample(boxes[image], gts, IOUS[stage])
            refined = []
            for box, row, is_gt in samples:
                logits, delta = oracle.box_head(stage, image, box)
                label = K if row is None else int(target.gt_classes[row])
                cls = cls - logits.log_softmax(dim=0)[label]
                count += 1
                if row is not None:
                    reg = reg + smooth_l1(delta - oracle.encode(stage, box, gts[row]))
                if not is_gt:
                    refined.append(oracle.decode(stage, box, delta))
            boxes[image] = refined
            for box, row, _ in sample(refined, gts, IOUS[stage]) if interleaved else samples:
                if row is None:
                    continue
                label = target.gt_classes[row]
                logits = oracle.mask_logits(stage, image, box)[-1][label]
                bitmap = target.gt_masks.tensor[row][None, None].float()
                goal = roi_align(bitmap, [box[None]], 28, 1.0, -1, True)[0, 0] >= 0.5
                mask = mask - torch.where(goal, logits, -logits).sigmoid().log().mean()
                positives += 1
        assert positives > 2 * 3  # more than the objects themselves
        losses[f"loss_cls_stage{stage}"] = WEIGHTS[stage] * cls / count
        losses[f"loss_box_reg_stage{stage}"] = WEIGHTS[stage] * reg / count
        losses[f"loss_mask_stage{stage}"] = WEIGHTS[stage] * mask / positives
    return losses


@pytest.fixture
def scene(request):
    overrides = getattr(request, "param", ())
    model = make_model(*overrides)
    for predictor in model.roi_heads.box_predictor:  # move boxes, but keep most of them positive
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
        torch.nn.init.normal_(predictor.bbox_pred.bias, std=0.1)
    batch = random_batch()
    batch[0]["instances"].gt_boxes.tensor[1] = batch[0]["instances"].gt_boxes.tensor[0] + 6
    features = model.roi_heads.region_features(pyramid())
    oracle = Oracle(model, features.pyramid, features.embedding, STDS)
    return model, batch, features, near_objects(batch), oracle


@pytest.mark.parametrize(
    "scene, interleaved",
    [((), True), (("HTC.INTERLEAVED", False), False)],
    indirect=["scene"],
)
def test_training_losses_and_gradients_equal_the_transcription(scene, interleaved):
    model, batch, features, proposals, oracle = scene
    with EventStorage():
        ours = model.roi_heads.train().losses(features, proposals, [x["instances"] for x in batch])
    expected = losses_by_hand(oracle, batch, proposals, interleaved)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert ours[name].item() == pytest.approx(expected[name].item(), rel=1e-4), name

    gradients = []
    for losses in (ours, expected):
        model.zero_grad(set_to_none=True)
        sum(losses.values()).backward(retain_graph=True)
        gradients.append({n: p.grad for n, p in model.roi_heads.named_parameters()})
    for name, gradient in gradients[1].items():
        if gradient is not None:  # the logits of the semantic branch take no part here
            assert torch.allclose(gradients[0][name], gradient, rtol=1e-3, atol=1e-5), name


def test_detections_equal_the_transcription(scene):
    model, _, features, proposals, oracle = scene
    with torch.no_grad():
        ours = model.roi_heads.eval().predict(features.pyramid, proposals)
        for image, result in enumerate(ours):
            rows = []
            for box in proposals[image].proposal_boxes.tensor:
                total = 0
                for stage in range(3):
                    logits, delta = oracle.box_head(stage, image, box)
                    box = oracle.decode(stage, box, delta)
                    total = total + logits / 3
                for label, score in enumerate(total.softmax(dim=0)[:K]):
                    if score > 0.001:
                        rows.append((box, score, label))
            boxes = torch.stack([r[0] for r in rows])
            scores = torch.stack([r[1] for r in rows])
            keep = batched_nms(boxes, scores, torch.tensor([r[2] for r in rows]), 0.5)[:10]
            assert torch.allclose(result.scores, scores[keep], atol=1e-5)
            assert torch.allclose(result.pred_boxes.tensor, boxes[keep], atol=1e-3)
            assert result.pred_classes.tolist() == [rows[i][2] for i in keep]
            for mask, box, label in zip(
                result.pred_masks, result.pred_boxes.tensor, result.pred_classes
            ):
                each = [x[label].sigmoid() for x in oracle.mask_logits(2, image, box)]
                assert torch.allclose(mask[0], sum(each) / 3, atol=1e-4)
