"""Random scenes of the built-in shapes data set: where objects lie, which of their pixels are
visible, and the finished image with its instance masks, crowd region and semantic map.

Objects are placed front to back: a new object goes behind all earlier ones, so its visible part is
known at once and an object that would be hidden is re-drawn instead of being left unannotated.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from d2ext.data.shapes.draw import (
    FILLS,
    STUFF_CLASSES,
    THING_CLASSES,
    draw_stuff,
    fill_weights,
    polygon_area,
    random_color,
    rasterize,
    unit_outline,
    value_noise,
)

MIN_SIZE = 8.0  # pixels, square root of the bounding-box area
MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION = 20, 0.25
TRANSPARENT_PROBABILITY = 0.2
IGNORE_LABEL = 255
_BAR, _NUM_THINGS = THING_CLASSES.index("bar"), len(THING_CLASSES)


@dataclass(frozen=True)
class Style:
    """What the scenes of a split have in common; sizes are square roots of box areas in pixels.

    Attributes:
        image_sizes: (width, height) to choose from.
        objects: least and largest number of objects.
        smallest: size of an object.
        largest: size of an object, as a fraction of the square root of the image's area.
        usual: sizes that half of the objects have.
        empty, crowd: probability of an image without objects, and of a crowd region.
    """

    image_sizes: tuple = ((160, 120), (120, 160), (128, 128), (160, 128))
    objects: tuple = (3, 12)
    smallest: float = MIN_SIZE
    largest: float = 0.5
    usual: tuple = (14.0, 56.0)
    empty: float = 0.02
    crowd: float = 0.065


# Like photographs in their size, and in the range of the sizes of their objects, 10 to 400 pixels.
LARGE = Style(((800, 600), (600, 800)), (4, 14), 10.0, 400 / 480000**0.5, (10.0, 400.0), 0, 0)


@dataclass
class _Shape:
    """One placed object; `visible` is a full-size bool mask, `coverage` lies in a window."""

    category: int
    center: np.ndarray
    size: float
    angle: float
    window: tuple  # (x0, y0, coverage)
    alpha: float
    color: np.ndarray
    visible: np.ndarray = None


@dataclass
class Scene:
    """A finished image with its ground truth.

    Attributes:
        image: uint8 RGB (H, W, 3).
        masks: list of bool (H, W), the visible pixels of each object. Masks overlap only where a
            transparent object covers another one.
        categories: list of int in [0, 8), one per mask.
        crowd: None or (mask, category) of the one crowd region.
        semantic: uint8 (H, W); 0..7 things, 8..11 stuff.
    """

    image: np.ndarray
    masks: list
    categories: list
    crowd: tuple
    semantic: np.ndarray


def _random_size(rng, style, largest):
    """Log-uniform in [smallest, largest] with extra weight on the usual sizes."""
    usual, most = style.usual
    low, high = (style.smallest, largest) if rng.random() < 0.5 else (usual, min(most, largest))
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _outline(rng, category, size, angle, longest):
    """Contours around the origin in pixels, rotated, with sqrt(bounding-box area) = size.

    Bars are scaled by their length instead: a thin bar along an axis has hardly any box area.
    """
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    if category == _BAR:
        length = min(max(1.3 * size, 14.0), longest)
        thickness = rng.uniform(2.0, max(2.5, length / 6))
        x, y = length / 2, thickness / 2
        return [np.array([[-x, -y], [x, -y], [x, y], [-x, y]]) @ rotation]
    contours = [c @ rotation for c in unit_outline(rng, THING_CLASSES[category])]
    extent = np.ptp(contours[0], axis=0)
    scale = size / np.sqrt(extent[0] * extent[1])
    middle = (contours[0].min(0) + contours[0].max(0)) / 2
    return [(c - middle) * scale for c in contours]


def _place(rng, shapes, height, width, style):
    """Draw category, size and centre: free, or overlapping an earlier object (a cluster)."""
    largest = style.largest * np.sqrt(height * width)
    category, size = int(rng.integers(_NUM_THINGS)), _random_size(rng, style, largest)
    center = rng.uniform(0.0, 1.0, 2) * (width, height)
    if shapes and rng.random() < 0.5:
        anchor = shapes[int(rng.integers(len(shapes)))]
        if anchor.category == _BAR and rng.random() < 0.6:
            # Behind the middle of a bar and shorter than it: cut into two visible parts.
            size = max(MIN_SIZE + 4, anchor.size * rng.uniform(0.5, 0.9))
            return category, size, anchor.center + rng.uniform(-2, 2, 2)
        if rng.random() < 0.35:
            category = anchor.category
        direction = rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(0.35, 0.95) * (size + anchor.size) / 2
        center = anchor.center + distance * np.array([np.cos(direction), np.sin(direction)])
    return category, size, center


def _distinct_color(rng, others):
    """A colour far from the given ones, as far as a few attempts allow."""
    candidates = np.stack([random_color(rng, saturation=(0.1, 1.0)) for _ in range(6)])
    distance = np.linalg.norm(candidates[:, None] - np.stack(others)[None], axis=2).min(1)
    return candidates[int(np.argmax(distance > 80) if (distance > 80).any() else distance.argmax())]


def _add_object(rng, shapes, hidden, background, style):
    """Try to add one object behind `shapes`; updates `hidden`, the pixels of opaque objects."""
    height, width = hidden.shape
    category, size, center = _place(rng, shapes, height, width, style)
    angle = rng.uniform(0, 2 * np.pi)
    contours = _outline(rng, category, size, angle, 0.75 * max(height, width))
    contours = [c + center for c in contours]
    window = rasterize(contours, height, width)
    if window is None:
        return False
    x0, y0, coverage = window
    visible = np.zeros((height, width), bool)
    visible[y0 : y0 + coverage.shape[0], x0 : x0 + coverage.shape[1]] = coverage > 0.5
    visible &= ~hidden
    pixels = int(visible.sum())
    if pixels < MIN_VISIBLE_PIXELS or pixels < MIN_VISIBLE_FRACTION * polygon_area(contours):
        return False
    near = [s.color for s in shapes if np.abs(s.center - center).max() < (s.size + size) / 2 + 4]
    alpha = rng.uniform(0.4, 0.8) if rng.random() < TRANSPARENT_PROBABILITY else 1.0
    color = _distinct_color(rng, [background[visible].mean(0), *near])
    shapes.append(_Shape(category, center, size, angle, window, alpha, color, visible))
    if alpha == 1.0:
        hidden |= visible
    return True


def _paint(rng, canvas, shape):
    """Blend one object into the float64 canvas, inside its window."""
    x0, y0, coverage = shape.window
    h, w = coverage.shape
    y, x = np.mgrid[y0 : y0 + h, x0 : x0 + w] + 0.5
    x, y = x - shape.center[0], y - shape.center[1]
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    fill = FILLS[int(rng.integers(len(FILLS)))]
    weight = fill_weights(rng, fill, cos * x + sin * y, cos * y - sin * x)[..., None]
    second = np.clip(shape.color + rng.choice([-1.0, 1.0]) * rng.uniform(45, 95, 3), 0, 255)
    color = shape.color + 0.8 * weight * (second - shape.color)
    opacity = (shape.alpha * coverage)[..., None]
    part = canvas[y0 : y0 + h, x0 : x0 + w]
    part += opacity * (color - part)


def _background(rng, height, width):
    """One stuff class, or two split by a wavy line; returns (float64 RGB, uint8 labels)."""
    first, second = rng.permutation(len(STUFF_CLASSES))[:2]
    canvas = draw_stuff(rng, STUFF_CLASSES[first], height, width)
    labels = np.full((height, width), _NUM_THINGS + first, np.uint8)
    if rng.random() < 0.55:
        y, x = np.mgrid[:height, :width].astype(np.float64)
        angle = rng.uniform(0, 2 * np.pi)
        across = (x - width * rng.uniform(0.3, 0.7)) * np.cos(angle)
        across += (y - height * rng.uniform(0.3, 0.7)) * np.sin(angle)
        along = (y * np.cos(angle) - x * np.sin(angle)) / rng.uniform(30, 80)
        across += rng.uniform(0, 8) * np.sin(2 * np.pi * (along + rng.random()))
        blend = np.clip(across + 0.5, 0, 1)[..., None]
        canvas += blend * (draw_stuff(rng, STUFF_CLASSES[second], height, width) - canvas)
        labels[across > 0] = _NUM_THINGS + second
    canvas *= 0.8 + 0.35 * value_noise(rng, height, width, 70, 70)[..., None]  # uneven light
    return np.clip(canvas, 0, 255), labels


def _crowd_shapes(rng, background):
    """Many tiny objects of one class in an elliptic region; returns (shapes, region mask)."""
    height, width = background.shape[:2]
    category = int(rng.choice([c for c in range(_NUM_THINGS) if c != _BAR]))
    center = rng.uniform(0.2, 0.8, 2) * (width, height)
    radii = rng.uniform(16, 32, 2)
    shapes, union = [], np.zeros((height, width), np.uint8)
    for _ in range(int(radii.prod() / 14)):
        direction, distance = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        middle = center + distance * radii * (np.cos(direction), np.sin(direction))
        size, angle = rng.uniform(5.0, 8.0), rng.uniform(0, 2 * np.pi)
        contours = [c + middle for c in _outline(rng, category, size, angle, width)]
        window = rasterize(contours, height, width)
        if window is None:
            continue
        color = _distinct_color(rng, [background.mean((0, 1))])
        shapes.append(_Shape(category, middle, size, angle, window, 1.0, color))
        x0, y0, coverage = window
        union[y0 : y0 + coverage.shape[0], x0 : x0 + coverage.shape[1]] |= coverage > 0.5
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    return shapes, cv2.morphologyEx(union, cv2.MORPH_CLOSE, disk).astype(bool)


def make_scene(seed, style=Style()):
    """Create one image with its ground truth.

    Args:
        seed: identifies the image; equal seeds give equal scenes.
        style: sizes and numbers.

    Returns:
        Scene
    """
    rng = np.random.default_rng(seed)
    width, height = style.image_sizes[int(rng.integers(len(style.image_sizes)))]
    canvas, semantic = _background(rng, height, width)
    shapes, tiny, crowd = [], [], None
    if rng.random() >= style.empty:
        hidden = np.zeros((height, width), bool)
        wanted = int(rng.integers(style.objects[0], style.objects[1] + 1))
        attempts = 0
        while len(shapes) < wanted and (attempts < 60 or len(shapes) < style.objects[0]):
            attempts += 1
            _add_object(rng, shapes, hidden, canvas, style)
        if rng.random() < style.crowd:
            tiny, region = _crowd_shapes(rng, canvas)
            region &= ~hidden
            if region.sum() >= 200:
                crowd = (region, tiny[0].category)
                semantic[region] = crowd[1]
            else:
                tiny = []
    for shape in tiny + shapes[::-1]:
        _paint(rng, canvas, shape)
    for shape in shapes[::-1]:
        semantic[shape.visible] = shape.category
    canvas += rng.standard_normal(canvas.shape) * rng.uniform(1.5, 4.0)  # sensor noise
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    masks, categories = [s.visible for s in shapes], [s.category for s in shapes]
    return Scene(image, masks, categories, crowd, semantic)
