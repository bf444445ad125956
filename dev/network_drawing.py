"""The shapes that figures of networks are made of, in one set of colours."""

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

INK, SOFT, PANEL = "#1c2128", "#5b6470", "#f4f5f7"
PYRAMID, SEMANTIC, BOXES, MASKS = "#3b76d6", "#1f9d6b", "#c8443c", "#d98a13"
TINTS = {PYRAMID: "#e3edfc", SEMANTIC: "#def3ea", BOXES: "#fbe6e4", MASKS: "#fcefd9"}


class Drawing:
    """A figure in units of its own, with the few shapes the networks are made of."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(0.82 * width, 0.82 * height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x, y, width, height, text, color, size=12, note=""):
        """A block centred at (x, y); `note` is a second, smaller line."""
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
        """A line along the points that ends in an arrow head; `halo` sets it off from others."""
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

    def backbone(self, x, y, levels=4):
        """Slices that become smaller to the right, centred at height `y`, from `x` on."""
        for level in range(levels):
            left, half = x + 0.34 * level, 1.3 - 0.26 * level
            corners = [
                (left, y - half),
                (left + 0.22, y - half + 0.1),
                (left + 0.22, y + half - 0.1),
                (left, y + half),
            ]
            shape = Polygon(corners, facecolor=TINTS[PYRAMID], edgecolor=PYRAMID, lw=1.6, zorder=4)
            self.axes.add_patch(shape)

    def legend(self, entries, y):
        """`(color, width, text, step)` in a row at the left; returns where the row ends."""
        x = 0.35
        for color, width, text, step in entries:
            self.line([(x, y), (x + 0.4, y)], color, width)
            self.text(x + 0.52, y, text, color=SOFT, ha="left")
            x += step
        return x
