"""The anchors of Faster R-CNN's Caffe release, which MNC and FCIS use."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)


@ANCHOR_GENERATOR_REGISTRY.register()
class RoundedAnchorGenerator(DefaultAnchorGenerator):
    """detectron2's anchor generator with the sizes and the order of the Caffe lineage.

    The sides of a box as large as one feature cell are rounded to whole pixels for each aspect
    ratio (23 x 12, 16 x 16, 11 x 22 at stride 16) and then multiplied; detectron2 does not round.
    The anchors of a cell are ordered by ratio first, then by size; detectron2: the other way round.

    With `offset` 0.5 (`MODEL.ANCHOR_GENERATOR.OFFSET`) they are the boxes of the release: there
    a cell's first and last pixel are 16 x and 16 x + 15, so the centre is 16 x + 8.
    """

    def _calculate_anchors(self, sizes, aspect_ratios):
        return BufferList(
            [
                self.generate_cell_anchors(s, a, base)
                for s, a, base in zip(sizes, aspect_ratios, self.strides)
            ]
        )

    def generate_cell_anchors(
        self,
        sizes: Sequence[float] = (128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        base_size: float = 16,
    ) -> Tensor:
        """Boxes around (0, 0).

        Args:
            sizes: side of the square anchors in pixels; each is `base_size` times a scale.
            aspect_ratios: height / width.
            base_size: side of the box whose variants are rounded, the feature stride.

        Returns:
            (ratios * sizes) x 4, ratio-major, continuous corners in pixels.
        """
        anchors = []
        for ratio in aspect_ratios:
            # Python rounds halves to even, as numpy does in the release.
            width = round(math.sqrt(base_size * base_size / ratio))
            height = round(width * ratio)
            for size in sizes:
                w, h = width * size / base_size / 2, height * size / base_size / 2
                anchors.append([-w, -h, w, h])
        return torch.tensor(anchors, dtype=torch.float32)
