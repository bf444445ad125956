"""The RoI warp of the stages (MNC paper, section 4) in the sizes of paper and releases."""

from d2ext.errors import UserError
from d2ext.ops import RoIWarpPooler


def build_pooler(
    warp_size: int,
    pool_size: int,
    scale: float,
    *,
    quantize: bool = True,
    aligned: bool = False,
    border: str = "clamp_half",
    bin_reduce: str = "point",
) -> RoIWarpPooler:
    """The RoI warp of the stages, with the maximum of 2x2 samples where the sizes ask for it.

    Args:
        warp_size: samples along each side of a box.
        pool_size: output along each side, `warp_size` or half of it.
        scale: feature cells per pixel.
        quantize: round boxes to whole feature cells, as both releases do.
        aligned, border, bin_reduce: see `d2ext.ops.roi_warp`.
    """
    if warp_size not in (pool_size, 2 * pool_size):
        raise UserError(
            f"MODEL.MNC.WARP_SIZE {warp_size} is neither POOL_SIZE {pool_size} nor twice of it"
        )
    if bin_reduce != "point" and (bin_reduce != "edge_max" or warp_size != pool_size):
        raise UserError(
            f"MODEL.MNC.WARP_BIN_REDUCE '{bin_reduce}' is neither 'point' nor, with WARP_SIZE as "
            "POOL_SIZE, 'edge_max'"
        )
    return RoIWarpPooler(
        pool_size,
        [scale],
        max_pool=warp_size != pool_size,
        aligned=aligned,
        quantize=quantize,
        border=border,
        bin_reduce=bin_reduce,
    )
