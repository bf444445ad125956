import json
from pathlib import Path

import pytest
import torch

from d2ext.modeling import RoundedAnchorGenerator
from d2ext.modeling.regions.boxes import to_inclusive

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "fcis_vectors.json"
RATIOS = [0.5, 1.0, 2.0]


def pixels(generator, *shapes):
    """Anchors of feature maps of the given shapes, as first and last pixels."""
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    return [to_inclusive(boxes.tensor) for boxes in generator(maps)]


@pytest.mark.parametrize("data, sizes", [("voc", [128, 256, 512]), ("coco", [64, 128, 256, 512])])
def test_anchors_of_the_first_cell_are_those_of_the_release(data, sizes):
    vectors = {v["id"]: v for v in json.loads(VECTORS.read_text())["vectors"]}
    generator = RoundedAnchorGenerator(
        sizes=[sizes], aspect_ratios=[RATIOS], strides=[16], offset=0.5
    )
    expected = torch.tensor(vectors["rpn_16_anchors"]["expected"][data])
    assert torch.equal(pixels(generator, (1, 1))[0], expected)
    assert generator.num_anchors == [len(expected)]


def test_cells_are_ordered_by_row_then_column():
    generator = RoundedAnchorGenerator(
        sizes=[[16, 32]], aspect_ratios=[RATIOS], strides=[16], offset=0.5
    )
    anchors = pixels(generator, (2, 3))[0].view(2, 3, 6, 4)
    for row in range(2):
        for column in range(3):
            shift = torch.tensor([16.0 * column, 16.0 * row] * 2)
            assert torch.equal(anchors[row, column], anchors[0, 0] + shift)


def test_sides_are_rounded_at_the_stride_of_the_level():
    generator = RoundedAnchorGenerator(
        sizes=[[8], [16]], aspect_ratios=[RATIOS], strides=[4, 8], offset=0.5
    )
    for anchors, stride in zip(pixels(generator, (1, 1), (1, 1)), (4, 8)):
        sides = (anchors[:, 2:] - anchors[:, :2] + 1).tolist()
        # sqrt(2) * 4 = 5.66 -> 6 and 4 / sqrt(2) = 2.83 -> 3; sqrt(2) * 8 = 11.3 -> 11, 5.66 -> 6
        w, h, n = {4: (6, 3, 3), 8: (11, 6, 6)}[stride]
        tall = n * 2
        assert sides == [[2 * w, 2 * h], [2 * stride] * 2, [2 * n, 2 * tall]]


def test_yaml_config_builds_the_same_anchors():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RoundedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[128, 256, 512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [RATIOS]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    yaml = build_anchor_generator(cfg, [ShapeSpec(channels=8, stride=16)])
    lazy = RoundedAnchorGenerator(
        sizes=[[128, 256, 512]], aspect_ratios=RATIOS, strides=[16], offset=0.5
    )
    assert torch.equal(pixels(yaml, (3, 4))[0], pixels(lazy, (3, 4))[0])
