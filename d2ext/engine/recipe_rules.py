"""The rules of recipes: from numbers about the data and the machine to settings of a training.

Every rule is a function of plain numbers and gives `Choice`s, which say why and after whom.
`d2ext.engine.recipe` reads the numbers and puts the choices into the config.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# detectron2 trains and tests COCO, of 480 pixels mostly, at 800 by at most 1333, and its training
# sizes go down to 640.
LONG_SIDE = 1333 / 800
ENLARGED = 800 / 480
TEST_SCALES = (0.75, 1.0, 1.25)  # of test-time augmentation
STRIDE = 16  # sizes are multiples of it
SMALLEST_ANCHOR = 4  # pixels
FAR_OUTSIDE = 0.5  # of the objects without an anchor of half to twice their size
MOST_WARMUP = 1000
USABLE = 0.85  # of a GPU's memory


class Choice(NamedTuple):
    """A setting, under its name in yaml configs; why it has this value, and who found the rule."""

    key: str
    value: Any
    why: str
    source: str

    def __str__(self) -> str:
        value = str(self.value).replace(" ", "") if self.value != "" else "''"
        return f"{self.key}={value}: {self.why} [{self.source}]"


class DataStatistics(NamedTuple):
    """Sizes of the images and objects of a training set.

    Attributes:
        num_images: with objects.
        images: (N, 2) height and width of every image, pixels.
        boxes: (M, 2) height and width of every object's box (crowds left out), pixels.
        owners: (M,) the image of every box.
    """

    num_images: int
    images: np.ndarray
    boxes: np.ndarray
    owners: np.ndarray

    def object_sizes(self, short_side: float) -> np.ndarray:
        """(M,) square roots of the boxes' areas, in images of that short side."""
        low, high = self.images.min(1), self.images.max(1)
        scale = np.minimum(short_side / low, short_side * LONG_SIDE / high)
        return np.sqrt(self.boxes.prod(1)) * scale[self.owners]

    def median_short_side(self) -> float:
        """Of the images as they are."""
        return float(np.median(self.images.min(1)))


def choose_size(
    data: DataStatistics,
    wanted: float,
    low: int,
    high: int,
    scales: Sequence[float],
    given: int = 0,
) -> list[Choice]:
    """Sizes of the images: a quarter of the objects stay below `wanted` pixels.

    Args:
        wanted: square root of a box's area.
        low, high: limits of the short side.
        scales: of training images, relative to that of tests.
        given: the short side that the user asks for, without limits; 0: none.
    """
    own = data.median_short_side()
    if given:
        side, why, source = given, "--image-size", "you"
    else:
        quarter = float(np.quantile(data.object_sizes(own), 0.25))
        side = own * wanted / max(quarter, 1e-6)
        side = min(max(min(side, own * ENLARGED), low), high)
        side = STRIDE * max(1, round(side / STRIDE))
        why = (
            f"a quarter of the objects are below {quarter:.0f} pixels at {own:.0f}, and should be "
            f"below {wanted:g}; {low} to {high}, at most {ENLARGED:.2f} of the images' own"
        )
        source = "COCO's small objects: Lin et al., ECCV 2014; 480 to 800 pixels: detectron2"
    sizes = [round(side * scale) for scale in scales]
    tests = [round(side * scale) for scale in TEST_SCALES]
    jitter = f"{', '.join(f'{scale:g}' for scale in scales)} of it"
    long, ratio = "1333/800 of the short side", "the ratio of detectron2's COCO configs"
    multiple = "several scales: detectron2's COCO configs; wider: Ghiasi et al., CVPR 2021"
    return [
        Choice("INPUT.MIN_SIZE_TEST", side, why, source),
        Choice("INPUT.MAX_SIZE_TEST", round(side * LONG_SIDE), long, ratio),
        Choice("INPUT.MIN_SIZE_TRAIN", sizes, jitter, multiple),
        Choice("INPUT.MAX_SIZE_TRAIN", round(max(sizes) * LONG_SIDE), long, ratio),
        Choice("TEST.AUG.MIN_SIZES", tests, "0.75, 1 and 1.25 of it", "test-time augmentation"),
        Choice("TEST.AUG.MAX_SIZE", round(tests[-1] * LONG_SIDE), long, ratio),
    ]


def choose_anchors(
    sizes: Sequence[float] | np.ndarray,
    ratios: Sequence[float] | np.ndarray,
    current: Sequence[Sequence[float]],
    mode: str,
) -> list[Choice]:
    """Sizes and shapes of the anchors, as many as there are: their weights keep their shapes.

    Args:
        sizes: of the objects in training images, pixels.
        ratios: height by width of the objects.
        current: sizes of the anchors, by level.
        mode: `"fit"`, or `"keep"` unless most objects lie outside.
    """
    key, flat = "MODEL.ANCHOR_GENERATOR.SIZES", sorted(s for level in current for s in level)
    source = "a size per octave: Lin et al., FPN, CVPR 2017, section 4.1"
    low, high = (float(np.quantile(sizes, q)) for q in (0.05, 0.95))
    outside = float(np.mean((np.asarray(sizes) < flat[0] / 2) | (np.asarray(sizes) > flat[-1] * 2)))
    if mode == "keep" and outside <= FAR_OUTSIDE:
        why = (
            f"the weights know these; {100 * outside:.0f}% of the objects are below half the "
            f"smallest or above twice the largest, more than {100 * FAR_OUTSIDE:.0f}% would change "
            "them"
        )
        return [Choice(key, [list(level) for level in current], why, "the published weights")]
    # One of each octave, around the middle of the objects; closer where they differ less and levels
    # do not fix the steps.
    step = 2.0
    if len(current) == 1 and len(flat) > 1:
        step = min(2.0, max(1.26, (high / max(low, 1e-6)) ** (1 / (len(flat) - 1))))
    first = math.sqrt(max(low, 1e-6) * high) / step ** ((len(flat) - 1) / 2)
    first = max(first, SMALLEST_ANCHOR)
    ladder = [round(first * step**i) for i in range(len(flat))]
    levels = iter(ladder)
    fitted = [[next(levels) for _ in level] for level in current]
    why = f"90% of the objects have {low:.0f} to {high:.0f} pixels in the training images"
    tall, wide = (float(np.quantile(ratios, q)) for q in (0.9, 0.1))
    shapes = [round(max(0.2, min(0.5, wide)), 2), 1.0, round(min(5.0, max(2.0, tall)), 2)]
    return [
        Choice(key, fitted, why, source),
        Choice(
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
            [shapes],
            f"height by width is {wide:.2f} to {tall:.2f} for 80% of the objects; 0.5 to 2 at "
            "least",
            "Ren et al., Faster R-CNN, NeurIPS 2015, section 3.1",
        ),
    ]


def choose_batch(
    most: int,
    num_images: int,
    megapixels: float,
    memory: Sequence[float],
    available: float = 0,
    processes: int = 1,
) -> Choice:
    """Images of an iteration, in all processes together.

    Args:
        most: of one process, and its number on a CPU.
        num_images: in the training set.
        megapixels: of a training image.
        memory: GiB of the network, and of each megapixel of an image.
        available: GiB of the smallest GPU; 0 on a CPU.
        processes: each takes as many.
    """
    each, why = most, f"{most} on a CPU"
    source = "small batches take more steps: Masters and Luschi, 2018"
    if available:
        fit = int((USABLE * available - memory[0]) / (memory[1] * max(megapixels, 1e-6)))
        each = max(1, min(most, fit))
        why = (
            f"{USABLE:.0%} of {available:.1f} GiB hold {memory[0]:g} and {memory[1]:g} per "
            f"megapixel for images of {megapixels:.2f}; at most {most}"
        )
        source = "training memory in the model zoos of detectron2 and MMDetection"
    each = max(1, min(each, num_images // processes))
    why += f", {num_images} images" + (f", {processes} processes" if processes > 1 else "")
    return Choice("SOLVER.IMS_PER_BATCH", each * processes, why, source)


def choose_length(
    epochs: float, num_images: int, batch: int, low: int = 1, high: int = 1, given: bool = False
) -> Choice:
    """Iterations of the training.

    Args:
        low, high: limits, which a number of epochs that is `given` by the user does not have.
    """
    wanted = max(1, math.ceil(epochs * num_images / batch))
    length = wanted if given else min(max(wanted, low), high)
    why = f"{epochs:g} epochs x {num_images} images / {batch} = {wanted}"
    if not given:
        why += f"; {low} to {high}"
    source = "64 epochs of 2975 images: He et al., Mask R-CNN, ICCV 2017, appendix A"
    return Choice("SOLVER.MAX_ITER", length, why, "you" if given else source)


def choose_rate(rate: float, reference: float, batch: int) -> Choice:
    """The learning rate follows the number of images of an iteration."""
    value = float(f"{rate * batch / reference:.4g}")
    why = f"{rate:g} for {reference:g} images, in proportion for {batch}"
    return Choice("SOLVER.BASE_LR", value, why, "linear scaling: Goyal et al., 2017, section 2.1")


def choose_warmup(length: int) -> Choice:
    """The warm-up ends within the run."""
    why = f"a tenth of the run, at most {MOST_WARMUP}"
    source = "gradual warm-up: Goyal et al., 2017, section 2.2; 1000: detectron2"
    return Choice("SOLVER.WARMUP_ITERS", min(MOST_WARMUP, max(1, length // 10)), why, source)


def choose_evaluation(
    length: int, batch: int, times: int, patience: int, test_images: int, metric: str
) -> list[Choice]:
    """When to evaluate and to save, which checkpoint is the best, and when to give up.

    Args:
        length: iterations of the training.
        times: evaluations, fewer where they would see more images than the training between them.
        test_images: 0 without a test set.
        metric: by which the best is chosen; "" for none.
    """
    period = max(1, math.ceil(length / max(times, 1)), math.ceil(test_images / batch))
    period = min(period, length)
    saved = Choice("SOLVER.CHECKPOINT_PERIOD", period, "with every evaluation", "convenience")
    source = "Prechelt, Early stopping - but when?, 1998"
    if not test_images:
        none = "there is no test set"
        return [
            saved,
            Choice("TEST.EVAL_PERIOD", 0, none, source),
            Choice("TEST.BEST_METRIC", "", none, source),
            Choice("TEST.EARLY_STOPPING", 0, none, source),
        ]
    why = f"{times} times in {length} iterations, not before {test_images} images were trained on"
    late = f"ends after {patience} evaluations without a better one"
    return [
        saved,
        Choice("TEST.EVAL_PERIOD", period, why, source),
        Choice("TEST.BEST_METRIC", metric, "model_best.pth is kept by it", source),
        Choice("TEST.EARLY_STOPPING", patience if metric else 0, late, source),
    ]
