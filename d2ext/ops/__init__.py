"""Operators of the projects: RoI warp, position-sensitive assembly, joint head, masks.

They need torch alone. `python -m d2ext.ops` says which implementation runs on which device.
"""

from d2ext.ops._library import has_native, watch_devices
from d2ext.ops.joint_head import fcis_joint_head
from d2ext.ops.mask_ops import mask_gate, mask_resize, mask_vote, paste_masks
from d2ext.ops.mask_voting import MaskVoting, vote_candidates
from d2ext.ops.poolers import PyramidROIAlignPooler, RoIWarpPooler, pool_averaged
from d2ext.ops.ps_roi import ps_roi_assemble, ps_roi_mean
from d2ext.ops.pyramid_roi_align import pyramid_roi_align
from d2ext.ops.roi_warp import RoIWarp, roi_warp, roi_warp_max_pool

watch_devices()

__all__ = [
    "MaskVoting",
    "PyramidROIAlignPooler",
    "RoIWarp",
    "RoIWarpPooler",
    "fcis_joint_head",
    "has_native",
    "mask_gate",
    "mask_resize",
    "mask_vote",
    "paste_masks",
    "pool_averaged",
    "ps_roi_assemble",
    "ps_roi_mean",
    "pyramid_roi_align",
    "roi_warp",
    "roi_warp_max_pool",
    "vote_candidates",
]
