"""Error types against what the authors' package gave, and one scene for each type."""

import json
from pathlib import Path

import pytest

from d2ext.evaluation.error_types import TYPES, error_types

from tests.evaluation.helpers import make_detections, make_truth

VECTORS = Path(__file__).resolve().parents[1] / "vectors/tide_vectors.json"
SIZE = (60, 80)
OBJECT = {"label": 0, "box": [10, 10, 20, 20]}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_numbers_are_those_of_tidecv(kind):
    """Made by tidecv 1.0.1 of random scenes with crowd regions."""
    vectors = json.loads(VECTORS.read_text())
    images, size = vectors["images"], vectors["size"]
    truth = make_truth([image["objects"] for image in images], size, "abc")
    found = [make_detections(n, x["detections"], size) for n, x in enumerate(images)]
    result, expected = error_types(truth, found, kind == "segm"), vectors["results"][kind]
    assert all(expected["counts"][name] for name in TYPES)
    assert result.counts == expected["counts"]
    assert result.ap50 == pytest.approx(expected["ap50"])
    assert result.gains == pytest.approx(expected["gains"])


@pytest.mark.parametrize(
    ("name", "label", "box"),
    [
        ("Cls", 1, [10, 10, 20, 20]),
        ("Loc", 0, [20, 14, 20, 20]),
        ("Both", 1, [20, 14, 20, 20]),
        ("Bkg", 0, [50, 40, 10, 10]),
    ],
)
def test_a_single_detection_has_the_type_of_its_mistake(name, label, box):
    truth = make_truth([[OBJECT]], SIZE, "ab")
    found = [make_detections(0, [{"label": label, "box": box, "score": 0.9}], SIZE)]
    result = error_types(truth, found, True)
    missed = int(name in ("Both", "Bkg"))
    assert result.counts == {**dict.fromkeys(TYPES, 0), name: 1, "Miss": missed}
    assert result.ap50 == 0
    if not missed:  # mended, it is all there is to be found
        assert result.gains[name] == pytest.approx(100)


def test_a_second_detection_of_an_object_is_a_duplicate():
    truth = make_truth([[OBJECT]], SIZE, "a")
    shapes = [{**OBJECT, "score": score} for score in (0.9, 0.8)]
    result = error_types(truth, [make_detections(0, shapes, SIZE)], False)
    assert result.counts == {**dict.fromkeys(TYPES, 0), "Dupe": 1}


def test_without_detections_all_objects_are_missed():
    truth = make_truth([[OBJECT], [OBJECT]], SIZE, "a")
    result = error_types(truth, [None, make_detections(1, [], SIZE)], True)
    assert result.counts["Miss"] == 2 and result.ap50 == 0


def test_scores_of_masks_rank_masks():
    truth = make_truth([[OBJECT]], SIZE, "a")
    far = {"label": 0, "box": [50, 40, 10, 10]}
    found = make_detections(0, [{**OBJECT, "score": 0.2}, {**far, "score": 0.9}], SIZE)
    own = found._replace(mask_scores=found.scores[::-1])
    assert error_types(truth, [own], True).ap50 == pytest.approx(100)
    assert error_types(truth, [own], False).ap50 == pytest.approx(50)
