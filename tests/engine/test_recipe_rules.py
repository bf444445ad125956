"""The rules of recipes, as functions of plain numbers."""

import numpy as np
import pytest

from d2ext.engine.recipe_rules import (
    Choice,
    DataStatistics,
    choose_anchors,
    choose_batch,
    choose_evaluation,
    choose_length,
    choose_rate,
    choose_size,
    choose_warmup,
)

PYRAMID = [[8], [16], [32], [64], [128]]


def data(*sizes, image=(600, 800)):
    """One image with square objects."""
    boxes = np.array([(size, size) for size in sizes], dtype=float)
    return DataStatistics(1, np.array([image], dtype=float), boxes, np.zeros(len(sizes), int))


SCALES = (0.5, 1.5)


def values(choices):
    return {choice.key: choice.value for choice in choices}


@pytest.mark.parametrize(
    "sizes, image, limits, side",
    [
        ((64, 64, 64, 64), (600, 800), (128, 480), 304),  # 600 * 32 / 64, in steps of 16
        ((40, 500, 500, 500, 500), (600, 800), (16, 480), 32),  # a quarter is at 500 already
        ((8, 8, 8), (600, 800), (128, 480), 480),  # small objects want more than the limit
        ((400, 400), (600, 800), (128, 480), 128),
        ((8, 8), (120, 160), (128, 480), 192),  # 1.67 times what there is
        ((8, 8), (60, 160), (128, 480), 128),  # but the lower limit holds
    ],
)
def test_short_side_follows_small_objects_within_limits(sizes, image, limits, side):
    found = values(choose_size(data(*sizes, image=image), 32, *limits, SCALES))
    assert found["INPUT.MIN_SIZE_TEST"] == side
    assert found["INPUT.MIN_SIZE_TRAIN"] == [round(side * x) for x in SCALES]
    assert found["INPUT.MAX_SIZE_TRAIN"] == round(found["INPUT.MIN_SIZE_TRAIN"][1] * 1333 / 800)
    assert found["INPUT.MAX_SIZE_TEST"] == round(side * 1333 / 800)


def test_a_given_size_has_no_limits():
    assert values(choose_size(data(5), 32, 128, 480, SCALES, 901))["INPUT.MIN_SIZE_TEST"] == 901


def test_objects_are_measured_where_the_long_side_is_the_limit():
    panorama = data(100, image=(400, 4000))
    assert panorama.object_sizes(400) == pytest.approx(100 * 400 * 1333 / 800 / 4000)
    assert data(100).object_sizes(300) == pytest.approx(50)


def test_anchors_of_a_pyramid_are_octaves_around_the_objects():
    sizes = np.geomspace(20, 320, 1001)
    middle = np.sqrt(np.quantile(sizes, 0.05) * np.quantile(sizes, 0.95))
    found = values(choose_anchors(sizes, [1.0], PYRAMID, "fit"))
    assert found["MODEL.ANCHOR_GENERATOR.SIZES"] == [[round(middle * 2.0**i)] for i in range(-2, 3)]
    assert found["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0]]


def test_anchors_of_one_level_lie_closer_where_objects_differ_less():
    sizes = np.full(10, 50.0).tolist() + [100.0] * 10
    found = values(choose_anchors(sizes, [1.0], [[12, 24, 48, 96]], "fit"))
    assert found["MODEL.ANCHOR_GENERATOR.SIZES"] == [[50, 63, 79, 100]]
    wide = np.geomspace(10, 2000, 101)
    (level,) = values(choose_anchors(wide, [1.0], [[12, 24, 48]], "fit"))[
        "MODEL.ANCHOR_GENERATOR.SIZES"
    ]
    assert [b / a for a, b in zip(level, level[1:])] == pytest.approx([2, 2], rel=0.02)


def test_anchors_are_never_below_four_pixels():
    found = values(choose_anchors([2.0, 3.0], [1.0], PYRAMID, "fit"))
    assert found["MODEL.ANCHOR_GENERATOR.SIZES"] == [[4], [8], [16], [32], [64]]


def test_anchors_become_longer_for_long_objects_within_limits():
    ratios = [0.05] * 5 + [1.0] * 10 + [3.5] * 5
    found = values(choose_anchors([50.0], ratios, PYRAMID, "fit"))
    assert found["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.2, 1.0, 3.5]]


def test_anchors_of_published_weights_stay_unless_most_objects_lie_far_outside():
    published = [[32], [64], [128], [256], [512]]
    near = choose_anchors([10.0] * 5 + [100.0] * 5, [1.0], published, "keep")
    assert values(near) == {"MODEL.ANCHOR_GENERATOR.SIZES": published}
    assert "50% of the objects" in near[0].why
    far = values(choose_anchors([10.0] * 6 + [100.0] * 4, [1.0], published, "keep"))
    assert far["MODEL.ANCHOR_GENERATOR.SIZES"] != published


@pytest.mark.parametrize(
    "arguments, batch",
    [
        (dict(most=2, num_images=100), 2),
        (dict(most=4, num_images=3), 3),
        (dict(most=4, num_images=100, available=8.0), 4),  # (6.8 - 1) / 1.2
        (dict(most=16, num_images=100, available=8.0), 4),
        (dict(most=16, num_images=100, available=24.0), 16),
        (dict(most=16, num_images=100, available=1.0), 1),
        (dict(most=2, num_images=100, processes=3), 6),
        (dict(most=2, num_images=3, processes=3), 3),
        (dict(most=2, num_images=1, processes=3), 3),  # a multiple of the processes
    ],
)
def test_batch_fits_memory_images_and_processes(arguments, batch):
    choice = choose_batch(megapixels=1.2, memory=(1.0, 1.0), **arguments)
    assert choice.value == batch


@pytest.mark.parametrize(
    "images, batch, given, length",
    [(24, 2, False, 768), (5, 2, False, 400), (500, 2, False, 2000), (500, 2, True, 16000)],
)
def test_length_is_a_number_of_epochs_within_limits(images, batch, given, length):
    assert choose_length(64, images, batch, 400, 2000, given).value == length


def test_rate_is_linear_in_the_batch_and_warm_up_ends_within_the_run():
    assert choose_rate(0.02, 16, 2).value == 0.0025
    assert choose_rate(0.001, 4, 4).value == 0.001
    assert [choose_warmup(n).value for n in (1, 400, 90000)] == [1, 40, 1000]


def test_evaluations_are_spread_over_the_run_and_no_dearer_than_the_training():
    found = values(choose_evaluation(1000, 2, 10, 5, 6, "segm/AP"))
    assert (found["TEST.EVAL_PERIOD"], found["TEST.EARLY_STOPPING"]) == (100, 5)
    assert found["SOLVER.CHECKPOINT_PERIOD"] == 100
    assert values(choose_evaluation(1000, 2, 10, 5, 500, "x"))["TEST.EVAL_PERIOD"] == 250
    assert values(choose_evaluation(100, 2, 10, 5, 500, "x"))["TEST.EVAL_PERIOD"] == 100


def test_nothing_is_evaluated_without_a_test_set_or_chosen_without_a_metric():
    found = values(choose_evaluation(1000, 2, 10, 5, 0, ""))
    assert (found["TEST.EVAL_PERIOD"], found["TEST.BEST_METRIC"]) == (0, "")
    assert values(choose_evaluation(1000, 2, 10, 5, 7, ""))["TEST.EARLY_STOPPING"] == 0


def test_every_choice_is_one_line_with_reason_and_source():
    choices = [
        *choose_size(data(30), 32, 128, 480, SCALES),
        *choose_anchors([30.0], [1.0], PYRAMID, "fit"),
        choose_batch(2, 10, 1.0, (1, 1)),
        choose_length(64, 10, 2, 1, 1000),
        choose_rate(0.1, 2, 2),
        choose_warmup(100),
        *choose_evaluation(100, 2, 10, 5, 10, ""),
    ]
    assert all(choice.why and choice.source and "\n" not in str(choice) for choice in choices)
    assert str(Choice("A.B", [1, 2], "why", "who")) == "A.B=[1,2]: why [who]"
