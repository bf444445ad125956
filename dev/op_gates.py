"""What dev/benchmark_ops.py asks of the operators: ratios to what one would use instead, and to the
time of moving inputs and outputs once.

Those of the CPU were set from measurements. Those of CUDA were counted from bytes and operations on
an H100 (3.0 TB/s, 67 TFLOP/s) and never measured: the first measured numbers take their place.
"""

from typing import NamedTuple


class Gates(NamedTuple):
    """`peers`: implementation and how many times faster ours has to be; `floor`: at most so many
    times the floor."""

    peers: tuple[tuple[str, float], ...] = ()
    floor: float | None = None


_CPU = {
    ("roi_warp", "fwd"): Gates((("grid_sample folded", 5.0), ("grid_sample expand", 4.0)), 5.0),
    ("roi_warp", "f+b"): Gates((("grid_sample folded", 5.0), ("roi_align sr=1", 12.0)), 5.0),
    ("roi_warp_max_pool", "fwd"): Gates((("grid_sample folded", 15.0),)),
    ("roi_warp_max_pool", "f+b"): Gates((("grid_sample folded", 9.0),)),
    ("pyramid_roi_align", "fwd"): Gates((("ROIPooler", 5.0), ("ROIPooler + average", 5.0))),
    ("pyramid_roi_align", "f+b"): Gates((("ROIPooler", 5.0), ("ROIPooler + average", 5.0))),
    ("fcis_joint_head", "fwd"): Gates(
        (("integral image", 25.0), ("copy by index", 6.0), ("torchvision ps_roi_pool 7x7", 8.0)),
        6.0,
    ),
    ("fcis_joint_head", "f+b"): Gates(
        (("integral image", 20.0), ("copy by index", 6.0), ("torchvision ps_roi_pool 7x7", 5.0)),
        6.0,
    ),
    ("paste_masks", "fwd"): Gates((("detectron2", 5.0), ("torchvision", 10.0)), 3.0),
    ("mask_vote", "fwd"): Gates((("numpy + OpenCV", 8.0),)),
}
_CUDA = {
    ("roi_warp", "fwd", "NCHW"): Gates((), 2.0),
    ("roi_warp", "fwd", "NHWC"): Gates((), 1.5),
    # both passes: the gradients may take 3 times their floor, 5 times in a fixed order
    ("roi_warp", "f+b"): Gates((("grid_sample folded", 2.0),), 3.0),
    ("roi_warp", "f+b ordered"): Gates((), 5.0),
    ("roi_warp_max_pool", "fwd"): Gates((), 3.0),
    ("fcis_joint_head", "fwd"): Gates((("assembled", 2.0),), 2.5),
    ("fcis_joint_head", "f+b"): Gates((), 3.0),
    ("paste_masks", "fwd"): Gates((("detectron2", 8.0),)),
}
GATES = {"cpu": _CPU, "cuda": _CUDA}


def gates_of(device: str, op: str, direction: str, layout: str) -> Gates:
    """The gates of an operator on "cpu" or "cuda"; those of a layout before those of any."""
    table = GATES[device]
    return table.get((op, direction, layout), table.get((op, direction), Gates()))
