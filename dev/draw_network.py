#!/usr/bin/env python
"""Draw the networks as docs/images/{cascade,mnc,fcis,htc}.svg and .png."""

import argparse
import os
import sys

import matplotlib
from matplotlib.figure import Figure
from network_drawing import (
    BOXES,
    INK,
    MASKS,
    PYRAMID,
    SEMANTIC,
    SOFT,
    Drawing,
)

from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

# Heights of the rows, and left edges of the stages.
BOX_ROW, BUS_ROW, MASK_ROW = 5.75, 3.85, 1.95
BUS_GAP = 0.11
BRANCHES = 6.1  # centre of the region proposal network and of the semantic branch
STAGES = (7.75, 10.4, 13.05)
STAGE_WIDTH = 2.3


def draw_htc() -> Figure:
    """The network as it is trained; at test time all mask heads run on the boxes of stage 3."""
    drawing = Drawing(18.3, 8.0)
    _draw_trunk(drawing)
    _draw_buses(drawing)
    for index, left in enumerate(STAGES):
        _draw_stage(drawing, index, left)
    _draw_outputs(drawing)
    _draw_legend(drawing)
    return drawing.figure


def _draw_trunk(drawing: Drawing) -> None:
    """Image, backbone, pyramid, proposals and the semantic branch."""
    drawing.box(0.75, BUS_ROW, 0.95, 0.95, "image", PYRAMID, size=10)
    drawing.arrow([(1.23, BUS_ROW), (1.6, BUS_ROW)], PYRAMID)
    drawing.backbone(1.72, BUS_ROW)
    drawing.text(2.3, BUS_ROW - 1.65, "backbone", weight="bold", size=10)
    drawing.arrow([(3.02, BUS_ROW), (3.4, BUS_ROW)], PYRAMID)
    for level, name in enumerate(("P2", "P3", "P4", "P5", "P6")):
        y = BUS_ROW - 1.0 + 0.5 * level
        drawing.box(4.1, y, 1.0 - 0.13 * level, 0.38, name, PYRAMID, size=8.5)
    drawing.panel(3.42, BUS_ROW - 1.35, 1.36, 2.7)
    drawing.text(4.1, BUS_ROW - 1.65, "pyramid", weight="bold", size=10)

    drawing.box(BRANCHES, BOX_ROW, 1.3, 0.95, "RPN", BOXES, note="proposals")
    drawing.arrow([(4.1, BUS_ROW + 1.35), (4.1, BOX_ROW), (BRANCHES - 0.65, BOX_ROW)], PYRAMID)

    drawing.box(BRANCHES, MASK_ROW, 1.5, 1.15, "semantic\nbranch", SEMANTIC, size=10.5)
    bend = [(4.78, BUS_ROW - 0.95), (5.05, BUS_ROW - 0.95), (5.05, MASK_ROW)]
    drawing.arrow([*bend, (BRANCHES - 0.75, MASK_ROW)], PYRAMID)
    drawing.text(BRANCHES, MASK_ROW - 0.78, "levels fused at stride 8", size=8.5, color=SOFT)
    drawing.arrow([(BRANCHES, MASK_ROW - 0.95), (BRANCHES, MASK_ROW - 1.28)], SEMANTIC, 1.4)
    drawing.text(
        BRANCHES, MASK_ROW - 1.47, "a label per pixel (training loss)", size=8.5, color=SEMANTIC
    )


def _draw_buses(drawing: Drawing) -> None:
    """Pyramid and semantic features, side by side, on offer to every stage."""
    end = STAGES[-1] + 0.75
    upper, lower = BUS_ROW + BUS_GAP, BUS_ROW - BUS_GAP
    drawing.line([(4.78, upper), (end, upper)], PYRAMID, 3)
    drawing.line([(BRANCHES, MASK_ROW + 0.58), (BRANCHES, lower), (end, lower)], SEMANTIC, 3)


def _draw_stage(drawing: Drawing, index: int, left: float) -> None:
    number, center = index + 1, left + STAGE_WIDTH / 2
    drawing.panel(left, MASK_ROW - 0.85, STAGE_WIDTH, BOX_ROW - MASK_ROW + 2.05, f"stage {number}")
    drawing.box(center, BOX_ROW, 1.5, 0.95, f"$B_{number}$", BOXES, 15, note="box head")
    drawing.box(center, MASK_ROW, 1.5, 0.95, f"$M_{number}$", MASKS, 15, note="mask head")

    tap = left + 0.72
    drawing.plus(tap, BUS_ROW)
    drawing.arrow([(tap, BUS_ROW + 0.2), (tap, BOX_ROW - 0.48)], INK, 1.5)
    drawing.arrow([(tap, BUS_ROW - 0.2), (tap, MASK_ROW + 0.48)], INK, 1.5)
    for y, size in ((BUS_ROW + 0.75, "7 × 7"), (BUS_ROW - 0.75, "14 × 14")):
        drawing.text(tap - 0.1, y, size, size=8, color=SOFT, ha="right")

    # The boxes this stage has refined: to its own mask head, and to the next stage.
    down = left + STAGE_WIDTH - 0.68
    drawing.arrow([(down, BOX_ROW - 0.48), (down, MASK_ROW + 0.48)], BOXES, 2.2, halo=True)
    drawing.text(down + 0.13, BUS_ROW + 0.75, f"$r_{number}$", size=11, color=BOXES, ha="left")
    source = BRANCHES + 0.65 if index == 0 else STAGES[index - 1] + STAGE_WIDTH / 2 + 0.75
    drawing.arrow([(source, BOX_ROW), (center - 0.75, BOX_ROW)], BOXES, 2.2)
    name = f"$r_{index}$"
    drawing.text((source + center - 0.75) / 2, BOX_ROW + 0.22, name, size=11, color=BOXES)
    if index:
        drawing.arrow([(source, MASK_ROW), (center - 0.75, MASK_ROW)], MASKS, 4)
        drawing.text((source + center - 0.75) / 2, MASK_ROW + 0.3, "1×1", size=8, color=MASKS)


def _draw_outputs(drawing: Drawing) -> None:
    """Boxes of the last stage; scores and masks averaged over the stages."""
    right = STAGES[-1] + STAGE_WIDTH / 2 + 0.75
    top, bottom, x = BOX_ROW + 1.5, MASK_ROW - 1.2, 16.2
    for left in STAGES:
        center = left + STAGE_WIDTH / 2
        drawing.line([(center + 0.5, BOX_ROW + 0.48), (center + 0.5, top)], SOFT, 1.2, zorder=1)
        drawing.line([(center, MASK_ROW - 0.48), (center, bottom)], SOFT, 1.2, zorder=1)
    drawing.arrow([(STAGES[0] + STAGE_WIDTH / 2 + 0.5, top), (x - 0.15, top)], SOFT, 1.2)
    drawing.arrow([(STAGES[0] + STAGE_WIDTH / 2, bottom), (x - 0.15, bottom)], SOFT, 1.2)
    drawing.arrow([(right, BOX_ROW), (x - 0.15, BOX_ROW)], BOXES, 2.2)
    drawing.text((right + x - 0.15) / 2 + 0.15, BOX_ROW + 0.22, "$r_3$", size=11, color=BOXES)
    for y, word, note in (
        (top, "classes", "mean of three stages"),
        (BOX_ROW, "boxes", "of the last stage"),
        (bottom, "masks", "mean of three stages, on $r_3$"),
    ):
        drawing.text(x, y + 0.12, word, size=11, weight="bold", ha="left")
        drawing.text(x, y - 0.17, note, size=8, color=SOFT, ha="left")


def _draw_legend(drawing: Drawing) -> None:
    y = 7.6
    entries = (
        (PYRAMID, 3, "pyramid features", 2.55),
        (SEMANTIC, 3, "semantic features", 2.65),
        (BOXES, 2.2, "boxes $r_t$, refined by $B_t$", 3.2),
        (MASKS, 4, "mask features handed on", 3.25),
    )
    x = drawing.legend(entries, y)
    drawing.plus(x + 0.2, y)
    drawing.text(x + 0.52, y, "region features: RoIAlign of both, summed", color=SOFT, ha="left")


def draw_fcis() -> Figure:
    """The network; at test time the refined boxes pass through the assembly a second time."""
    drawing = Drawing(18.3, 7.2)
    row, upper, lower = 3.6, 5.2, 2.0
    drawing.box(0.75, row, 0.95, 0.95, "image", PYRAMID, size=10)
    drawing.arrow([(1.23, row), (1.6, row)], PYRAMID)
    drawing.backbone(1.72, row, levels=3)
    drawing.text(2.2, row - 1.65, "conv1 – res4", weight="bold", size=10)
    drawing.line([(2.65, row), (3.1, row)], PYRAMID)
    drawing.arrow([(3.1, row), (3.1, upper), (3.6, upper)], PYRAMID)
    drawing.box(4.35, upper, 1.4, 0.95, "RPN", BOXES, note="proposals")
    drawing.arrow([(3.1, row), (3.1, lower), (3.6, lower)], PYRAMID)
    drawing.box(4.35, lower, 1.4, 0.95, "res5", PYRAMID, note="dilated, stride 16")
    drawing.arrow([(5.05, lower), (5.55, lower)], PYRAMID)
    drawing.box(6.2, lower, 1.2, 0.95, "1×1 conv", PYRAMID, size=10, note="1024")

    drawing.panel(7.35, 1.0, 2.7, 4.0, "maps of the whole image")
    for y, color, word, note in (
        (3.75, MASKS, "score maps", "classes × 2 sides × k²"),
        (2.0, BOXES, "box maps", "4 × k²"),
    ):
        for step in (2, 1, 0):
            drawing.box(8.7 + 0.08 * step, y + 0.08 * step, 2.1, 0.95, "", color)
        drawing.text(8.7, y + 0.16, word, size=11, weight="bold")
        drawing.text(8.7, y - 0.2, note, size=8.5, color=SOFT)
    drawing.arrow([(6.8, lower), (7.62, lower)], PYRAMID)
    drawing.arrow([(7.15, lower), (7.15, 3.75), (7.62, 3.75)], PYRAMID)

    drawing.panel(10.55, 1.0, 2.2, 5.0, "per region")
    for y in (3.75, 2.0):
        drawing.box(11.65, y, 1.7, 0.95, "assembly", PYRAMID, size=11, note="21 × 21 bins")
        drawing.arrow([(9.95, y), (10.78, y)], INK, 1.6)
    drawing.arrow([(5.05, upper), (11.65, upper), (11.65, 4.24)], BOXES, 2.2)
    drawing.text(8.7, upper + 0.22, "region boxes", size=9.5, color=BOXES)
    drawing.line([(11.65, 3.27), (11.65, 2.5)], BOXES, 2.2)

    drawing.panel(13.2, 2.7, 2.3, 3.3, "inside and outside")
    drawing.arrow([(12.5, 3.95), (12.95, 3.95), (12.95, 4.75), (13.45, 4.75)], MASKS, 2.2)
    drawing.arrow([(12.5, 3.6), (13.45, 3.6)], MASKS, 2.2)
    drawing.box(14.35, 4.75, 1.75, 0.85, "maximum", SEMANTIC, size=11, note="then mean")
    drawing.box(14.35, 3.35, 1.75, 0.85, "softmax", MASKS, size=11, note="of the best class")
    drawing.box(14.35, 2.0, 1.75, 0.85, "mean", BOXES, size=11, note="of all bins")
    drawing.arrow([(12.5, 2.0), (13.45, 2.0)], BOXES, 2.2)
    for y, color, word, note in (
        (4.75, SEMANTIC, "class", "softmax over classes"),
        (3.35, MASKS, "mask", "merged by voting"),
        (2.0, BOXES, "refined box", "second pass at test time"),
    ):
        drawing.arrow([(15.24, y), (16.1, y)], color, 2.2)
        drawing.text(16.25, y + 0.12, word, size=11, weight="bold", ha="left")
        drawing.text(16.25, y - 0.17, note, size=8, color=SOFT, ha="left")
    back = [(17.0, 1.6), (17.0, 0.55), (11.3, 0.55), (11.3, 1.5)]
    drawing.arrow(back, BOXES, 1.4)
    drawing.legend(
        (
            (PYRAMID, 2, "features", 1.8),
            (BOXES, 2.2, "boxes", 1.5),
            (MASKS, 2.2, "pixel is inside or outside of the object", 4.6),
            (SEMANTIC, 2.2, "category", 1.8),
        ),
        6.8,
    )
    return drawing.figure


def draw_mnc() -> Figure:
    """The five stages; the fourth and fifth have the weights of the second and third."""
    drawing = Drawing(18.3, 7.6)
    row, bus = 5.0, 2.2
    drawing.box(0.75, bus, 0.95, 0.95, "image", PYRAMID, size=10)
    drawing.arrow([(1.23, bus), (1.6, bus)], PYRAMID)
    drawing.backbone(1.72, bus)
    drawing.text(2.3, bus - 1.55, "shared convolutions", weight="bold", size=10)
    drawing.line([(3.02, bus), (14.9, bus)], PYRAMID, 3)
    drawing.box(3.9, row, 1.5, 0.95, "RPN", BOXES, 12, note="stage 1: boxes")
    drawing.arrow([(3.9, bus), (3.9, row - 0.48)], PYRAMID)
    source = 4.65
    for number, left in ((2, 5.35), (4, 11.15)):
        masks, classes = left + 1.15, left + 3.35
        drawing.panel(left, 1.5, 4.5, 4.75, "")
        title = "second pass, the same weights" if number == 4 else "first pass"
        drawing.text(left + 2.25, 6.0, title, size=11, color=SOFT)
        drawing.box(masks, row, 1.75, 0.95, "masks", MASKS, 12, note=f"stage {number}")
        drawing.box(
            classes, row, 1.75, 0.95, "categories", SEMANTIC, 12, note=f"stage {number + 1}"
        )
        warp = left + 2.25
        drawing.box(warp, 3.3, 1.9, 0.8, "RoI warp", PYRAMID, 11, note="differentiable")
        drawing.arrow([(warp, bus), (warp, 2.9)], PYRAMID, 1.6)
        for x, start in ((masks, warp - 0.4), (classes, warp + 0.4)):
            drawing.arrow([(start, 3.7), (start, 4.1), (x, 4.1), (x, row - 0.48)], INK, 1.6)
        drawing.arrow([(source, row), (masks - 0.88, row)], BOXES, 2.2)
        tap = (source + masks - 0.88) / 2
        drawing.arrow([(tap, row), (tap, 3.3), (warp - 0.95, 3.3)], BOXES, 2.2)
        drawing.arrow([(masks + 0.88, row), (classes - 0.88, row)], MASKS, 4)
        drawing.text((masks + classes) / 2, row + 0.25, "gate", size=8, color=MASKS)
        source = classes + 0.88
    drawing.text(10.5, row + 0.75, "bridge", size=9.5, color=BOXES, weight="bold")
    drawing.text(10.5, row + 0.5, "boxes refined", size=8, color=SOFT)
    drawing.arrow([(source, row), (16.0, row)], SOFT, 1.6)
    for y, word, note in (
        (row + 0.35, "masks, scores", "of both passes"),
        (row - 0.45, "voting", "at the size of the image"),
    ):
        drawing.text(16.15, y + 0.12, word, size=11, weight="bold", ha="left")
        drawing.text(16.15, y - 0.17, note, size=8, color=SOFT, ha="left")
    drawing.legend(
        (
            (PYRAMID, 3, "features", 1.8),
            (BOXES, 2.2, "boxes, with gradients", 3.0),
            (MASKS, 4, "masks gate the features of the classifier", 4.6),
        ),
        7.2,
    )
    return drawing.figure


def draw_cascade() -> Figure:
    """Cascade Mask R-CNN as detectron2 has it; with the first box head alone it is Mask R-CNN."""
    drawing = Drawing(18.3, 7.0)
    row, mask_row, bus = 5.0, 1.75, 3.3
    drawing.box(0.75, bus, 0.95, 0.95, "image", PYRAMID, size=10)
    drawing.arrow([(1.23, bus), (1.6, bus)], PYRAMID)
    drawing.backbone(1.72, bus)
    drawing.text(2.3, bus - 1.65, "backbone", weight="bold", size=10)
    drawing.arrow([(3.02, bus), (3.4, bus)], PYRAMID)
    for level, name in enumerate(("P2", "P3", "P4", "P5", "P6")):
        drawing.box(4.1, bus - 1.0 + 0.5 * level, 1.0 - 0.13 * level, 0.38, name, PYRAMID, size=8.5)
    drawing.panel(3.42, bus - 1.35, 1.36, 2.7)
    drawing.text(4.1, bus - 1.65, "pyramid", weight="bold", size=10)
    drawing.box(6.1, row, 1.3, 0.95, "RPN", BOXES, note="proposals")
    drawing.arrow([(4.1, bus + 1.35), (4.1, row), (5.45, row)], PYRAMID)
    drawing.line([(4.78, bus), (13.3, bus)], PYRAMID, 3)
    drawing.panel(7.3, 4.1, 2.6, 2.1, "Mask R-CNN ends here")
    source = 6.75
    for number, x in enumerate((8.6, 11.2, 13.8), start=1):
        drawing.box(x, row, 1.6, 0.95, f"$B_{number}$", BOXES, 15, note="box head")
        tap = x - 0.5
        drawing.arrow([(tap, bus), (tap, row - 0.48)], INK, 1.5)
        drawing.text(tap - 0.1, bus + 0.6, "7 × 7", size=8, color=SOFT, ha="right")
        drawing.arrow([(source, row), (x - 0.8, row)], BOXES, 2.2)
        drawing.text((source + x - 0.8) / 2, row + 0.22, f"$r_{number - 1}$", 11, BOXES)
        source = x + 0.8
    drawing.box(8.6, mask_row, 1.6, 0.95, "M", MASKS, 15, note="mask head")
    drawing.arrow([(8.1, bus), (8.1, mask_row + 0.48)], INK, 1.5)
    drawing.text(8.0, bus - 0.6, "14 × 14", size=8, color=SOFT, ha="right")
    drawing.arrow([(source, row), (16.0, row)], BOXES, 2.2)
    drawing.text(15.3, row + 0.22, "$r_3$", 11, BOXES)
    drawing.arrow([(9.4, mask_row), (16.0, mask_row)], MASKS, 2.2)
    for y, word, note in (
        (row + 0.45, "classes", "mean of three stages"),
        (row - 0.45, "boxes", "of the last stage"),
        (mask_row, "masks", "of the last boxes at test time"),
    ):
        drawing.text(16.15, y + 0.12, word, size=11, weight="bold", ha="left")
        drawing.text(16.15, y - 0.17, note, size=8, color=SOFT, ha="left")
    drawing.legend(
        (
            (PYRAMID, 3, "pyramid features", 2.55),
            (BOXES, 2.2, "boxes $r_t$, refined by $B_t$", 3.2),
            (MASKS, 2.2, "masks", 1.5),
        ),
        6.6,
    )
    return drawing.figure


FIGURES = {"cascade": draw_cascade, "mnc": draw_mnc, "fcis": draw_fcis, "htc": draw_htc}


def write(folder: str) -> None:
    """All files; an SVG holds letters as outlines and looks the same everywhere."""
    try:
        os.makedirs(folder, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "d2ext"}):
            for name, draw in FIGURES.items():
                figure = draw()
                figure.savefig(os.path.join(folder, f"{name}.svg"), metadata={"Date": None})
                figure.savefig(os.path.join(folder, f"{name}.png"), dpi=130)
                print(f"{folder}: {name}.svg, {name}.png")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="docs/images", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return run_guarded(lambda: write(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
