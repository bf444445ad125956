"""Inputs and peers of dev/benchmark_ops.py: what users run today in place of d2ext.ops."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision

from d2ext.ops.reference import joint_head as head_reference

SCALE = 1 / 16
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None  # its peers are left out else


# ------------------------------------------------------------------ inputs
def random_rois(count: int, batch: int, height: int, width: int) -> torch.Tensor:
    """Sides log-uniform in 32..600 px, aspect 1/2..2, clipped to the image."""
    side = 32 * (600 / 32) ** torch.rand(count)
    aspect = 0.5 * 4 ** torch.rand(count)
    size = torch.stack([side * aspect.sqrt(), side / aspect.sqrt()], 1)
    limit = torch.tensor([width, height], dtype=torch.float32)
    centre = torch.rand(count, 2) * limit
    low = (centre - size / 2).clamp(min=0)
    high = torch.minimum(centre + size / 2, limit - 1)
    image = torch.randint(batch, (count, 1)).float()
    return torch.cat([image, low, torch.maximum(high, low + 1)], 1)


def smooth_masks(count: int, size: int) -> torch.Tensor:
    """Random probabilities (count, size, size) without much detail."""
    return F.interpolate(torch.rand(count, 1, 4, 4), (size, size), mode="bilinear")[:, 0]


# ------------------------------------------------------------------ peers
def folded_grid(rois: torch.Tensor, shape, size) -> torch.Tensor:
    """All RoIs of one image in one tall sampling grid, (1, N*P, P, 2)."""
    grids = []
    for low, high, length in ((1, 3, shape[3]), (2, 4, shape[2])):
        place = torch.arange(size, dtype=rois.dtype, device=rois.device) / size
        start = rois[:, low, None] * SCALE
        u = start + ((rois[:, high, None] * SCALE) - start).clamp(min=0) * place
        grids.append(2 * u / (length - 1) - 1)
    x = grids[0][:, None, :].expand(-1, size, -1)
    y = grids[1][:, :, None].expand(-1, -1, size)
    return torch.stack([x, y], -1).reshape(1, -1, size, 2)


def grid_sample_folded(feature, rois, size):
    grid = folded_grid(rois, feature.shape, size)
    out = F.grid_sample(feature, grid, padding_mode="border", align_corners=True)
    out = out.view(feature.shape[1], len(rois), size, size)
    return out.permute(1, 0, 2, 3).contiguous()


def grid_sample_expand(feature, rois, size):
    grid = folded_grid(rois, feature.shape, size).view(len(rois), size, size, 2)
    batch = feature.expand(len(rois), -1, -1, -1)
    return F.grid_sample(batch, grid, padding_mode="border", align_corners=True)


def pooler_of_detectron2(size, scales, sampling_ratio, average) -> Callable:
    """detectron2's `ROIPooler` for one image: torchvision's roi_align, level by level."""
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    pooler = ROIPooler(size * average, scales, sampling_ratio, "ROIAlignV2")

    def pool(*tensors):
        *features, rois = tensors
        out = pooler(features, [Boxes(rois[:, 1:])])
        return out if average == 1 else F.adaptive_avg_pool2d(out, size)

    return pool


def paste_of_detectron2(height: int, width: int) -> Callable:
    from detectron2.layers.mask_ops import paste_masks_in_image

    return lambda masks, boxes: paste_masks_in_image(masks, boxes, (height, width))


def assembly_by_integral(score, rois, group, size):
    """Exact assembly in PyTorch: integral image, four reads per bin (N, 2K, P, P)."""
    batch, channels, height, width = score.shape
    maps = channels // group**2
    table = F.pad(score, (1, 0, 1, 0)).cumsum(2).cumsum(3)
    table = table.view(batch, maps, group**2, height + 1, width + 1).permute(0, 2, 3, 4, 1)
    table = table.reshape(-1, maps)
    assembly = head_reference.Assembly(score.shape, rois, SCALE, group, size, True)
    total = 0
    for rows, sign in assembly._corners():
        total = total + sign * table.index_select(0, rows)
    area = assembly.area.clamp(min=1).to(score.dtype)
    return (total.view(*assembly.area.shape[:3], maps) / area).permute(0, 3, 1, 2)


def assembly_by_copy(score, rois, group, size):
    """One cell per bin by advanced indexing (InstanceFCN's rule)."""
    batch, channels, height, width = score.shape
    maps = channels // group**2
    place = (torch.arange(size, device=score.device) + 0.5) / size
    x = rois[:, 1, None] * SCALE + (rois[:, 3] - rois[:, 1])[:, None] * SCALE * place
    y = rois[:, 2, None] * SCALE + (rois[:, 4] - rois[:, 2])[:, None] * SCALE * place
    x, y = x.long().clamp(0, width - 1), y.long().clamp(0, height - 1)
    part = torch.arange(size, device=score.device) * group // size
    part = part[:, None] * group + part[None]
    view = score.view(batch, maps, group**2, height * width)
    cell = y[:, :, None] * width + x[:, None, :]
    picked = view[rois[:, 0].long()[:, None, None], :, part[None], cell]
    return picked.permute(0, 3, 1, 2)


def head_of(assembled):
    return assembled.unflatten(1, (-1, 2)).max(2).values.mean((2, 3))


def head_by_torchvision_7x7(score, rois, group):
    return head_of(torchvision.ops.ps_roi_pool(score, rois, group, SCALE))


def published_vote(masks, boxes, lists, height, width):
    """The released CPU loop: OpenCV resizes, whole-image float sums."""
    import cv2
    import numpy as np

    results = []
    masks, boxes = masks.numpy(), boxes.round().int().numpy()
    for members, weights in lists:
        total = np.zeros((height, width))
        for member, weight in zip(members, weights, strict=True):
            x1, y1, x2, y2 = boxes[member]
            drawn = cv2.resize(masks[member], (int(x2 - x1 + 1), int(y2 - y1 + 1)))
            total[y1 : y2 + 1, x1 : x2 + 1] += weight * (drawn >= 0.4)
        ys, xs = np.where(total >= 0.4)
        if len(xs):
            crop = total[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            results.append(cv2.resize(crop.astype(np.float32), masks.shape[1:]))
    return results
