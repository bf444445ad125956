"""Masks of regions in the image: `d2ext.ops.paste_masks` in the place of detectron2's loop."""

import torch
from torch import Tensor

from d2ext.ops import paste_masks
from d2ext.ops._library import implementation

from detectron2.utils.memory import retry_if_cuda_oom


def paste_region_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5
) -> Tensor | None:
    """Paste masks as detectron2's `paste_masks_in_image` does.

    Pixels whose interpolated value lies within 1e-5 of the threshold may fall on the other side, as
    both round in different orders. Of masks in half precision detectron2 also rounds the places at
    which it samples them; these are not. Beside the result, no memory grows with the image.

    Args:
        masks: (N, M, M) values in 0..1.
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the image, continuous.
        height, width: of the image.
        threshold: values from here on belong to the mask.

    Returns:
        bool (N, height, width); None where this cannot be done, so that detectron2 shall: without
        a kernel for the device, while tracing, and below a threshold of 0.5, for which detectron2
        cuts the soft borders of masks on the CPU only.
    """
    device = masks.device.type
    if (
        device not in ("cpu", "cuda")
        or implementation("paste_masks", device)[0] != "native"
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or threshold < 0.5
        or boxes.device != masks.device
    ):
        return None
    if not len(masks):
        return masks.new_zeros((0, height, width), dtype=torch.bool)
    masks = masks.detach() if masks.is_floating_point() else masks.float()
    paste = retry_if_cuda_oom(paste_masks)
    return paste(masks.contiguous(), boxes.detach().float(), (height, width), threshold=threshold)
