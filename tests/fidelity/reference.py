"""Pieces of the reference implementations: nothing here comes from the package under test, and next
to nothing from torchvision or detectron2."""

import math

import numpy as np
import torch
from torch.nn import functional as F


def resnet(weights, x, blocks, *, stride_in_1x1, dilated_res5=False, caffe_pool=False):
    """res2 ... res5 of a bottleneck ResNet (He et al. 2016), in double precision.

    Args:
        weights: {"stem": (w, bn), (stage, block, layer): (w, bn)} with layer 1, 2, 3 or "shortcut"
            and bn = (scale, bias, mean, variance).
    """

    def conv_bn(x, key, stride=1, padding=0, dilation=1):
        w, (scale, bias, mean, var) = weights[key]
        x = F.conv2d(x, w, None, stride, padding, dilation)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5)
        return x * scale.view(shape) + bias.view(shape)

    x = conv_bn(x, "stem", 2, 3).clamp(min=0)
    if caffe_pool:  # no padding, but a last window that sticks out
        high, wide = (math.ceil((n - 3) / 2) * 2 + 3 for n in x.shape[2:])
        x = F.pad(x, (0, wide - x.shape[3], 0, high - x.shape[2]), value=-math.inf)
    else:
        x = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    x = F.max_pool2d(x, 3, 2)
    outputs = []
    for stage, count in enumerate(blocks, start=2):
        for j in range(count):
            dilation = 2 if dilated_res5 and stage == 5 else 1
            stride = 2 if j == 0 and stage > 2 and dilation == 1 else 1
            first, second = (stride, 1) if stride_in_1x1 else (1, stride)
            y = conv_bn(x, (stage, j, 1), first).clamp(min=0)
            y = conv_bn(y, (stage, j, 2), second, dilation, dilation).clamp(min=0)
            y = conv_bn(y, (stage, j, 3))
            shortcut = conv_bn(x, (stage, j, "shortcut"), stride) if j == 0 else x
            x = (y + shortcut).clamp(min=0)
        outputs.append(x)
    return outputs


def iou_matrix(a, b, extra=0.0):
    """IoU of boxes; `extra` 1 for corners that are first and last pixels."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    area = [(x[:, 2] - x[:, 0] + extra) * (x[:, 3] - x[:, 1] + extra) for x in (a, b)]
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    size = (high - low + extra).clip(min=0)
    both = size[..., 0] * size[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return both / (area[0][:, None] + area[1][None] - both)


def greedy_nms(boxes, scores, threshold, extra=0.0):
    """Rows that survive, best first; a box goes if its IoU with a better one exceeds the limit."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    iou, kept = iou_matrix(boxes, boxes, extra), []
    for row in order:
        if all(not iou[row, other] > threshold for other in kept):
            kept.append(int(row))
    return kept


def resize_half_pixel(image, height, width):
    """Bilinear, pixel centres at halves, border repeated, no smoothing (OpenCV's INTER_LINEAR)."""

    def axis(size, new):
        position = ((np.arange(new) + 0.5) * size / new - 0.5).clip(0, size - 1)
        low = np.floor(position).astype(int)
        return low, np.minimum(low + 1, size - 1), position - low

    y0, y1, fy = axis(image.shape[0], height)
    x0, x1, fx = axis(image.shape[1], width)
    fy = fy[:, None]
    top = image[y0][:, x0] * (1 - fx) + image[y0][:, x1] * fx
    bottom = image[y1][:, x0] * (1 - fx) + image[y1][:, x1] * fx
    return top * (1 - fy) + bottom * fy


def resize_corners(x, height, width):
    """Bilinear with the corner pixels on each other."""

    def axis(size, new):
        position = torch.arange(new, dtype=torch.float64) * (size - 1) / max(new - 1, 1)
        low = position.floor().long().clamp(max=size - 1)
        return low, (low + 1).clamp(max=size - 1), position - low

    y0, y1, fy = axis(x.shape[2], height)
    x0, x1, fx = axis(x.shape[3], width)
    rows = x[:, :, y0] * (1 - fy)[:, None] + x[:, :, y1] * fy[:, None]
    return rows[..., x0] * (1 - fx) + rows[..., x1] * fx


def roi_align(feature, box, size, scale):
    """C x size x size averages of bilinear samples, ceil(bin) of them along each side."""
    x1, y1, x2, y2 = (float(v) * scale - 0.5 for v in box)
    samples = []
    for low, high in ((y1, y2), (x1, x2)):
        cell = (high - low) / size
        count = math.ceil(cell)
        if count == 0:  # a box without extent has no samples
            return feature.new_zeros(len(feature), size, size)
        steps = (torch.arange(size * count, dtype=torch.float64) + 0.5) / count
        samples.append((low + steps * cell, count))
    (ys, ny), (xs, nx) = samples

    def axis(position, n):
        outside = (position < -1) | (position > n)
        position = position.clamp(0, n - 1)
        low = position.floor().long()
        return low, (low + 1).clamp(max=n - 1), position - low, outside

    y_low, y_high, fy, y_out = axis(ys, feature.shape[1])
    x_low, x_high, fx, x_out = axis(xs, feature.shape[2])
    rows = feature[:, y_low] * (1 - fy)[:, None] + feature[:, y_high] * fy[:, None]
    values = rows[..., x_low] * (1 - fx) + rows[..., x_high] * fx
    values = values * ~(y_out[:, None] | x_out)
    return values.unflatten(2, (size, nx)).unflatten(1, (size, ny)).mean((2, 4))


def assert_near(actual, expected, limit=1e-4):
    """Equal shapes, and differences below `limit` of the largest value."""
    actual = torch.as_tensor(np.asarray(actual) if not torch.is_tensor(actual) else actual)
    expected = torch.as_tensor(np.asarray(expected) if not torch.is_tensor(expected) else expected)
    assert tuple(actual.shape) == tuple(expected.shape)
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < limit, float(error)
