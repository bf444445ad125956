"""Region poolers by the name that a yaml config gives them, `POOLER_TYPE`."""

from collections.abc import Sequence

from torch import nn

from d2ext import compat
from d2ext.errors import UserError
from d2ext.ops import PyramidROIAlignPooler, RoIWarpPooler

from detectron2.modeling.poolers import ROIPooler


def _pyramid(output_size, scales, sampling_ratio, **canonical) -> PyramidROIAlignPooler:
    return PyramidROIAlignPooler(output_size, scales, sampling_ratio, **canonical)


def _warp(output_size, scales, sampling_ratio, **canonical) -> RoIWarpPooler:
    if sampling_ratio not in (0, 1):
        raise UserError(
            f"POOLER_TYPE RoIWarp takes one sample per bin: set POOLER_SAMPLING_RATIO to 0 or 1, "
            f"not {sampling_ratio}"
        )
    return RoIWarpPooler(output_size, scales, **canonical)


POOLER_TYPES = {"PyramidROIAlign": _pyramid, "RoIWarp": _warp}


def register_pooler_types() -> None:
    """Make `POOLER_TYPES` known to every head of detectron2 that builds an `ROIPooler`."""
    compat.offer_poolers(POOLER_TYPES)


def build_region_pooler(
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    pooler_type: str,
    canonical_box_size: int = 224,
    canonical_level: int = 4,
) -> nn.Module:
    """The pooler of a name: what `ROIPooler` takes, and the names of `POOLER_TYPES`.

    `ROIAlignV2` is pooled by `PyramidROIAlignPooler`: the same result up to rounding, in one call.
    """
    canonical = {"canonical_box_size": canonical_box_size, "canonical_level": canonical_level}
    name = "PyramidROIAlign" if pooler_type == "ROIAlignV2" else pooler_type
    if name in POOLER_TYPES:
        return POOLER_TYPES[name](output_size, scales, sampling_ratio, **canonical)
    return ROIPooler(output_size, scales, sampling_ratio, pooler_type, **canonical)
