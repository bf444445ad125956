"""From the candidates of both passes to the instances of an image: mask voting (MNC paper, section
6) in pixels of the original image, and masks at its resolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling.regions.boxes import clip_boxes, pixel_boxes, to_continuous, to_inclusive
from d2ext.ops import MaskVoting, vote_candidates

from detectron2.config import configurable
from detectron2.structures import Boxes, Instances


def draw_binary_masks(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float
) -> Tensor:
    """Masks made binary, resized to their boxes, made binary again, and put into the image.

    Args:
        masks: R x M x M values in 0..1.
        boxes: R x 4 in pixels of the image, x2 and y2 exclusive; rounded to whole pixels.
        image_size: (height, width).
        threshold: values from here on belong to the mask, both times.

    Returns:
        R x height x width, bool.
    """
    height, width = image_size
    drawn = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    binary = (masks >= threshold).float()
    for row, (x1, y1, x2, y2) in enumerate(pixel_boxes(boxes).tolist()):
        size = (y2 - y1 + 1, x2 - x1 + 1)
        resized = F.interpolate(
            binary[row][None, None], size, mode="bilinear", align_corners=False
        )[0, 0]
        top, left = max(-y1, 0), max(-x1, 0)
        part = resized[top : max(height - y1, 0), left : max(width - x1, 0)] >= threshold
        y, x = y1 + top, x1 + left
        drawn[row, y : y + part.shape[0], x : x + part.shape[1]] = part
    return drawn


def draw_votes(
    masks: Tensor,
    boxes: Tensor,
    candidates: tuple[Tensor, Tensor, Tensor],
    windows: Tensor,
    image_size: tuple[int, int],
    threshold: float,
) -> Tensor:
    """Weighted averages of box masks at the resolution of the image.

    Every mask is sampled bilinearly at `(x - x1) * M / width`, without interpolation in its last
    row and column, as in the vote itself.

    Args:
        masks: N x M x M values in 0..1.
        boxes: N x 4, inclusive corners in pixels of the image.
        candidates: index, offset and weight from `d2ext.ops.vote_candidates`.
        windows: R x 4 int, inclusive; nothing outside them is drawn.
        image_size: (height, width).
        threshold: averages above it belong to the mask.

    Returns:
        R x height x width, bool.
    """
    index, offset, weight = candidates
    drawn = torch.zeros((len(windows), *image_size), dtype=torch.bool, device=masks.device)
    bounds = offset.tolist()
    for row, (x1, y1, x2, y2) in enumerate(windows.tolist()):
        voters = index[bounds[row] : bounds[row + 1]].long()
        share = weight[bounds[row] : bounds[row + 1]]
        rows = _corner_weights(y1, y2, boxes[voters, 1], boxes[voters, 3], masks.shape[1])
        columns = _corner_weights(x1, x2, boxes[voters, 0], boxes[voters, 2], masks.shape[2])
        # In the last row nothing is interpolated, along x neither; and the other way round.
        value = rows[0] @ masks[voters] @ columns[0].mT
        plain = rows[1] @ masks[voters] @ columns[1].mT
        value = torch.where(rows[2][:, :, None] | columns[2][:, None], plain, value)
        total = (share[:, None, None] * value).sum(dim=0)
        drawn[row, y1 : y2 + 1, x1 : x2 + 1] = total > threshold
    return drawn


def _corner_weights(
    first: int, last: int, low: Tensor, high: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For pixels first..last along one axis of V boxes: weights (V x pixels x size) of the mask's
    cells, the same without interpolation, and whether a pixel falls into the last cell."""
    pixel = torch.arange(first, last + 1, dtype=low.dtype, device=low.device)[None]
    low, high = low[:, None], high[:, None]
    inside = (pixel >= low) & (pixel <= high)
    position = ((pixel - low) * size / (high - low + 1)).clamp(0, size - 1)
    cell = position.floor()
    plain = F.one_hot(cell.long(), size).to(low.dtype) * inside[..., None]
    after = F.one_hot((cell.long() + 1).clamp(max=size - 1), size) * inside[..., None]
    share = (position - cell)[..., None]
    return plain * (1 - share) + after * share, plain, cell == size - 1


class InstanceVoting(nn.Module):
    """Selects, merges and draws the instances of an image. Has no parameters."""

    @configurable
    def __init__(
        self,
        *,
        voting: bool = True,
        mode: str = "mnc",
        masks: str = "compat",
        nms_threshold: float = 0.3,
        merge_threshold: float = 0.5,
        mask_threshold: float = 0.4,
        max_per_image: int = 100,
        score_threshold: float = 0.0,
        legacy_plus_one: bool = False,
    ):
        """
        Args:
            voting: average the masks of overlapping candidates; otherwise each instance
                keeps its own box and mask.
            mode: "mnc" or "crop", see `d2ext.ops.mask_vote`.
            masks: "compat": the voted M x M mask is made binary and resized, as in the
                release and its evaluation; "direct": the vote itself at image resolution, always
                sampled as in mode "mnc". Without `voting` they are the same.
            nms_threshold: candidates above this IoU with a better one of the class start
                no instance.
            merge_threshold: candidates with at least this IoU with an instance's box vote
                for its mask, whatever their score.
            mask_threshold: where masks are made binary.
            max_per_image: instances per image; equal scores may exceed it.
            score_threshold: least score of an instance.
            legacy_plus_one: scale indices of first and last pixels to the original image,
                instead of the edges of the boxes.
        """
        super().__init__()
        if masks not in ("compat", "direct"):
            raise UserError(f"MODEL.MNC.OUTPUT_MASKS '{masks}' is neither 'compat' nor 'direct'")
        if mode not in ("mnc", "crop"):
            raise UserError(f"MODEL.MNC.VOTING_MODE '{mode}' is neither 'mnc' nor 'crop'")
        self.voting = voting
        self.masks = masks
        self.mask_threshold = mask_threshold
        self.legacy_plus_one = legacy_plus_one
        self.vote = MaskVoting(
            mode=mode,
            nms_threshold=nms_threshold,
            merge_threshold=merge_threshold,
            binary_threshold=mask_threshold,
            max_per_image=max_per_image,
            score_threshold=score_threshold,
        )

    @classmethod
    def from_config(cls, cfg):
        own = cfg.MODEL.MNC
        return {
            "voting": own.VOTING,
            "mode": own.VOTING_MODE,
            "masks": own.OUTPUT_MASKS,
            "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "mask_threshold": own.BIN_THRESH,
            "max_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "legacy_plus_one": own.LEGACY_PLUS_ONE,
        }

    @torch.no_grad()
    def forward(self, candidates: Instances, image_size: tuple[int, int]) -> Instances:
        """
        Args:
            candidates: `pred_boxes` in pixels of the network input, `pred_masks`
                (n x 1 x M x M) and `class_scores` (n x K).
            image_size: (height, width) of the original image.

        Returns:
            `pred_boxes` (tight around the voted mask), `scores`, `pred_classes`
            and `pred_masks` (bool, height x width), class by class, best first.
        """
        boxes = self.to_image(candidates.pred_boxes.tensor, candidates.image_size, image_size)
        masks = candidates.pred_masks[:, 0].float()
        draw = self._voted if self.voting else self._unvoted
        boxes, masks, scores, classes = draw(boxes, masks, candidates.class_scores, image_size)
        result = Instances(image_size)
        result.pred_boxes = Boxes(to_continuous(boxes))
        result.scores = scores
        result.pred_classes = classes
        result.pred_masks = masks
        return result

    def to_image(
        self, boxes: Tensor, network_size: tuple[int, int], image_size: tuple[int, int]
    ) -> Tensor:
        """Continuous boxes of the network input -> inclusive boxes of the image, clipped to it."""
        height, width = (new / old for new, old in zip(image_size, network_size))
        factor = boxes.new_tensor([width, height, width, height])
        if self.legacy_plus_one:
            boxes = to_continuous(to_inclusive(boxes.float()) * factor)
        else:
            boxes = boxes.float() * factor
        return to_inclusive(clip_boxes(boxes, image_size, whole_pixel=True))

    def _voted(self, boxes: Tensor, masks: Tensor, scores: Tensor, size: tuple[int, int]):
        found = self.vote(boxes, masks, scores, size)
        tight = found.boxes.to(boxes.dtype)
        if self.masks == "compat":
            drawn = draw_binary_masks(found.masks, to_continuous(tight), size, self.mask_threshold)
        else:
            candidates = vote_candidates(
                boxes,
                scores,
                found.seeds,
                found.classes,
                iou_threshold=self.vote.merge_threshold,
            )
            drawn = draw_votes(masks, boxes, candidates, found.boxes, size, self.mask_threshold)
        return tight, drawn, found.scores, found.classes

    def _unvoted(self, boxes: Tensor, masks: Tensor, scores: Tensor, size: tuple[int, int]):
        seeds, classes = self.vote.choose_seeds(boxes, scores.float())
        boxes, masks = boxes[seeds], masks[seeds]
        drawn = draw_binary_masks(masks, to_continuous(boxes), size, self.mask_threshold)
        return boxes, drawn, scores[seeds, classes].float(), classes
