#!/usr/bin/env python
"""Draw the network of Hybrid Task Cascade as docs/images/htc.svg and htc.png."""

import argparse
import os
import sys

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

INK, SOFT, PANEL = "#1c2128", "#5b6470", "#f4f5f7"
PYRAMID, SEMANTIC, BOXES, MASKS = "#3b76d6", "#1f9d6b", "#c8443c", "#d98a13"
TINTS = {PYRAMID: "#e3edfc", SEMANTIC: "#def3ea", BOXES: "#fbe6e4", MASKS: "#fcefd9"}

# Heights of the rows, and left edges of the stages.
BOX_ROW, BUS_ROW, MASK_ROW = 5.75, 3.85, 1.95
BUS_GAP = 0.11
BRANCHES = 6.1  # centre of the region proposal network and of the semantic branch
STAGES = (7.75, 10.4, 13.05)
STAGE_WIDTH = 2.3


class Drawing:
    """A figure in units of its own, with the few shapes the networks are made of."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(0.82 * width, 0.82 * height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x, y, width, height, text, color, size=12, note=""):
        """A block centred at (x, y); ``note`` is a second, smaller line."""
        shape = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=TINTS[color],
            edgecolor=color,
            linewidth=1.6,
            zorder=4,
        )
        self.axes.add_patch(shape)
        self.text(x, y + (0.16 if note else 0), text, size=size, weight="bold")
        if note:
            self.text(x, y - 0.2, note, size=8.5, color=SOFT)

    def panel(self, x, y, width, height, title=""):
        """A pale area behind blocks that belong together."""
        shape = FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.18",
            facecolor=PANEL,
            edgecolor="none",
            zorder=0,
        )
        self.axes.add_patch(shape)
        self.text(x + width / 2, y + height - 0.25, title, size=11, color=SOFT)

    def text(self, x, y, text, size=9.5, color=INK, **options):
        options = {"ha": "center", "va": "center", "zorder": 6, **options}
        self.axes.text(x, y, text, fontsize=size, color=color, **options)

    def line(self, points, color, width=2.0, **options):
        xs, ys = zip(*points)
        options = {"zorder": 2, "solid_joinstyle": "round", "solid_capstyle": "round", **options}
        self.axes.plot(xs, ys, color=color, linewidth=width, **options)

    def arrow(self, points, color, width=2.0, zorder=3, halo=False):
        """A line along the points that ends in an arrow head; ``halo`` sets it off from others."""
        start, end = points[-2], points[-1]
        if halo:
            self.line(points, "white", width + 5, zorder=zorder - 0.5, solid_capstyle="butt")
        if len(points) > 2:
            self.line(points[:-1], color, width, zorder=zorder)
        head = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=5,head_width=2.6",
            shrinkA=0,
            shrinkB=0,
            color=color,
            linewidth=width,
            zorder=zorder,
        )
        self.axes.add_patch(head)

    def plus(self, x, y):
        """The sum of two feature maps."""
        self.axes.add_patch(Circle((x, y), 0.2, facecolor="white", edgecolor=INK, lw=1.3, zorder=5))
        for dx, dy in ((0.11, 0), (0, 0.11)):
            self.line([(x - dx, y - dy), (x + dx, y + dy)], INK, 1.3, zorder=6)


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
    for level in range(4):
        x, half = 1.72 + 0.34 * level, 1.3 - 0.26 * level
        corners = [
            (x, BUS_ROW - half),
            (x + 0.22, BUS_ROW - half + 0.1),
            (x + 0.22, BUS_ROW + half - 0.1),
            (x, BUS_ROW + half),
        ]
        drawing.axes.add_patch(
            Polygon(corners, facecolor=TINTS[PYRAMID], edgecolor=PYRAMID, lw=1.6, zorder=4)
        )
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
    x = 0.35
    for color, width, text, step in entries:
        drawing.line([(x, y), (x + 0.4, y)], color, width)
        drawing.text(x + 0.52, y, text, color=SOFT, ha="left")
        x += step
    drawing.plus(x + 0.2, y)
    drawing.text(x + 0.52, y, "region features: RoIAlign of both, summed", color=SOFT, ha="left")


def write(folder: str) -> None:
    """Both files; the SVG holds letters as outlines and looks the same everywhere."""
    try:
        os.makedirs(folder, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "d2ext"}):
            figure = draw_htc()
            figure.savefig(os.path.join(folder, "htc.svg"), metadata={"Date": None})
            figure.savefig(os.path.join(folder, "htc.png"), dpi=130)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    print(f"{folder}: htc.svg, htc.png")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="docs/images", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return run_guarded(lambda: write(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
