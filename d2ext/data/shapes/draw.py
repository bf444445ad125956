"""Drawing primitives of the built-in shapes data set: outlines of the eight classes, coverage by
supersampling, fill textures and stuff backgrounds.

All arithmetic that ends up in a pixel is integer or float64, so that the content hash of a
generated data set does not depend on the SIMD path a machine takes.
"""

import cv2
import numpy as np

THING_CLASSES = ("disk", "rectangle", "triangle", "star", "ring", "bar", "cross", "crescent")
STUFF_CLASSES = ("grass", "brick", "waves", "gravel")
FILLS = ("plain", "stripes", "checker", "dots", "gradient", "noise")
SUPERSAMPLE = 4
_SHIFT = 4  # fractional bits of the coordinates handed to cv2.fillPoly


def _arc(start, stop, num, rx=0.5, ry=0.5, center=(0.0, 0.0)):
    angles = np.linspace(start, stop, num)
    return np.stack([center[0] + rx * np.cos(angles), center[1] + ry * np.sin(angles)], axis=1)


def _ellipse(rx, ry):
    return _arc(0, 2 * np.pi, 65, rx, ry)[:-1]


def _crescent(rng):
    """Unit disk without a second disk shifted along x; the horns lie where the circles meet."""
    radius, shift = rng.uniform(0.72, 0.86), rng.uniform(0.40, 0.52)
    meet_x = (1 + shift**2 - radius**2) / (2 * shift)
    outer_angle = np.arccos(np.clip(meet_x, -1, 1))
    inner_angle = np.arccos(np.clip((meet_x - shift) / radius, -1, 1))
    outer = _arc(outer_angle, 2 * np.pi - outer_angle, 48, 1, 1)
    inner = _arc(2 * np.pi - inner_angle, inner_angle, 40, radius, radius, (shift, 0.0))
    return np.concatenate([outer, inner])


def unit_outline(rng, name):
    """Random outline of one class around the origin, in an arbitrary unit.

    Args:
        rng (numpy.random.Generator): source of the proportions.
        name: one of `THING_CLASSES` except "bar", whose thickness is given in pixels.

    Returns:
        closed contours (N, 2) as x, y; a second contour is a hole.
    """
    if name == "disk":
        return [_ellipse(0.5 * rng.uniform(1.0, 1.5), 0.5)]
    if name == "ring":
        rx, hole = 0.5 * rng.uniform(1.0, 1.35), rng.uniform(0.5, 0.68)
        return [_ellipse(rx, 0.5), _ellipse(rx * hole, 0.5 * hole)]
    if name == "rectangle":
        x = 0.5 * rng.uniform(1.0, 2.0)
        return [np.array([[-x, -0.5], [x, -0.5], [x, 0.5], [-x, 0.5]])]
    if name == "triangle":
        apex, height = rng.uniform(-0.3, 0.3), rng.uniform(0.8, 1.25)
        return [np.array([[-0.5, height / 3], [0.5, height / 3], [apex, -2 * height / 3]])]
    if name == "star":
        points, inner = int(rng.integers(5, 7)), rng.uniform(0.38, 0.48)
        angles = np.arange(2 * points) * np.pi / points
        radius = np.where(np.arange(2 * points) % 2 == 0, 0.5, 0.5 * inner)
        return [np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)]
    if name == "cross":
        a = 0.5 * rng.uniform(0.26, 0.38)
        x = [-a, a, a, 0.5, 0.5, a, a, -a, -a, -0.5, -0.5, -a]
        y = [-0.5, -0.5, -a, -a, a, a, 0.5, 0.5, a, a, -a, -a]
        return [np.stack([x, y], axis=1)]
    if name == "crescent":
        return [_crescent(rng)]
    raise ValueError(f"no outline for class {name!r}; known: {', '.join(THING_CLASSES)}")


def polygon_area(contours):
    """Area of the first contour less the areas of the others (shoelace formula)."""
    areas = [
        abs(np.sum(c[:, 0] * np.roll(c[:, 1], -1) - c[:, 1] * np.roll(c[:, 0], -1))) / 2
        for c in contours
    ]
    return float(areas[0] - sum(areas[1:]))


def rasterize(contours, height, width):
    """Coverage of each pixel by a polygon, in a window clipped to the image.

    Args:
        contours: (N, 2) in pixels; pixel column x covers [x, x + 1).
        height, width: image size.

    Returns:
        (x0, y0, coverage) with coverage float64 (h, w) in [0, 1] in steps of 1/16,
        or None when the polygon lies outside of the image.
    """
    points = np.concatenate(contours)
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 1, (width, height))
    if x1 <= x0 or y1 <= y0:
        return None
    canvas = np.zeros(((y1 - y0) * SUPERSAMPLE, (x1 - x0) * SUPERSAMPLE), np.uint8)
    # OpenCV's integer coordinate k is the centre of (sub)pixel k, hence the half step.
    scaled = [
        np.rint(((c - (x0, y0)) * SUPERSAMPLE - 0.5) * (1 << _SHIFT)).astype(np.int32)
        for c in contours
    ]
    cv2.fillPoly(canvas, scaled, 1, lineType=cv2.LINE_8, shift=_SHIFT)
    blocks = canvas.reshape(y1 - y0, SUPERSAMPLE, x1 - x0, SUPERSAMPLE)
    return int(x0), int(y0), blocks.sum(axis=(1, 3)) / SUPERSAMPLE**2


def value_noise(rng, height, width, cell_y, cell_x):
    """Smooth noise in [0, 1]: random values on a grid of cells, linearly interpolated."""
    grid = rng.random((int(height / cell_y) + 2, int(width / cell_x) + 2))
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)


def random_color(rng, hue=None, saturation=(0.45, 1.0), value=(0.3, 1.0)):
    """RGB in [0, 255], float64 (3,); `hue` is a (low, high) range in turns, None for any."""
    h = rng.uniform(*(hue or (0.0, 1.0)))
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    ramp = np.abs(((h + np.array([0.0, 2 / 3, 1 / 3])) % 1.0) * 6 - 3) - 1
    return 255.0 * v * (1 - s + s * np.clip(ramp, 0, 1))


def fill_weights(rng, fill, u, v):
    """Blend weight of the second colour of a texture at object coordinates.

    Args:
        rng (numpy.random.Generator): source of the period and of the noise.
        fill: one of `FILLS`.
        u, v: (h, w) coordinates in the rotated frame of the object, in pixels.

    Returns:
        (h, w) float64 in [0, 1].
    """
    period = rng.uniform(4.0, 10.0)
    if fill == "plain":
        return np.zeros_like(u)
    if fill == "stripes":
        return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * u / period), 0, 1)
    if fill == "checker":
        waves = np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)
        return np.clip(0.5 + 4 * waves, 0, 1)
    if fill == "dots":
        du, dv = (u % period) - period / 2, (v % period) - period / 2
        return np.clip(0.30 * period - np.sqrt(du * du + dv * dv) + 0.5, 0, 1)
    if fill == "gradient":
        return (u - u.min()) / max(np.ptp(u), 1.0)
    if fill == "noise":
        return np.clip(1.6 * value_noise(rng, *u.shape, 2.5, 2.5) - 0.3, 0, 1)
    raise ValueError(f"no fill {fill!r}; known: {', '.join(FILLS)}")


def _grass(rng, height, width):
    blades = 0.6 * value_noise(rng, height, width, 5.0, 1.2)
    blades += 0.4 * value_noise(rng, height, width, 16.0, 12.0)
    dark, light = (
        random_color(rng, (0.22, 0.36), (0.45, 0.7), v) for v in [(0.2, 0.3), (0.5, 0.7)]
    )
    return dark + blades[..., None] * (light - dark)


def _brick(rng, height, width):
    brick_h = rng.uniform(8.0, 14.0)
    brick_w = brick_h * rng.uniform(1.9, 2.5)
    y, x = np.mgrid[:height, :width] + rng.uniform(0, 20, (2, 1, 1))
    row = np.floor(y / brick_h).astype(int)
    shifted = x / brick_w + 0.5 * (row % 2)
    column = np.floor(shifted).astype(int)
    joint = ((y % brick_h) < 1.5) | (((shifted - column) * brick_w) < 1.5)
    base = random_color(rng, (-0.02, 0.06), (0.45, 0.65), (0.45, 0.65))
    shade = rng.uniform(0.75, 1.15, (row.max() + 1, column.max() + 1))[row, column]
    mortar = np.full(3, rng.uniform(150, 190))
    return np.where(joint[..., None], mortar, base * shade[..., None])


def _waves(rng, height, width):
    y, x = np.mgrid[:height, :width].astype(np.float64)
    period, length = rng.uniform(8.0, 14.0), rng.uniform(30.0, 60.0)
    bend = rng.uniform(1.5, 4.0) * np.sin(2 * np.pi * (x / length + rng.random()))
    crest = 0.5 + 0.5 * np.sin(2 * np.pi * (y + bend) / period + rng.uniform(0, 6))
    low = random_color(rng, (0.52, 0.64), (0.55, 0.8), (0.3, 0.45))
    high = random_color(rng, (0.5, 0.6), (0.25, 0.45), (0.65, 0.85))
    return low + (crest**2)[..., None] * (high - low)


def _gravel(rng, height, width):
    """Pebbles: cells of a jittered grid, shaded towards their borders."""
    cell = rng.uniform(5.0, 8.0)
    rows, columns = int(height / cell) + 4, int(width / cell) + 4
    jitter = rng.uniform(0.1, 0.9, (rows, columns, 2))
    tone = rng.uniform(0.55, 1.1, (rows, columns))
    y, x = np.mgrid[:height, :width] / cell + 1.5
    best, shade = np.full((height, width), np.inf), np.zeros((height, width))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            r, c = np.floor(y).astype(int) + dy, np.floor(x).astype(int) + dx
            distance = (r + jitter[r, c, 0] - y) ** 2 + (c + jitter[r, c, 1] - x) ** 2
            nearer = distance < best
            best, shade = np.where(nearer, distance, best), np.where(nearer, tone[r, c], shade)
    base = random_color(rng, (0.05, 0.15), (0.02, 0.2), (0.5, 0.7))
    return base * (shade * (1 - 0.6 * np.clip(best, 0, 1)))[..., None]


def draw_stuff(rng, name, height, width):
    """Background of one stuff class, float64 RGB (height, width, 3) in [0, 255]."""
    painters = {"grass": _grass, "brick": _brick, "waves": _waves, "gravel": _gravel}
    return np.clip(painters[name](rng, height, width), 0, 255)
