"""Boundary IoU against its definition, pixel by pixel, and boundary AP with crowd regions."""

import contextlib
import io

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2ext.evaluation import boundary_iou, evaluate_coco, mask_boundary
from d2ext.evaluation.boundary import boundary_rle, boundary_width
from d2ext.evaluation.coco_scores import IMPLEMENTATIONS
from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections


def boundary_by_pixel(mask, width):
    """Pixels of the mask that see the outside within `width` rows and columns."""
    height, length = mask.shape
    result = np.zeros(mask.shape, bool)
    for y, x in zip(*np.nonzero(mask)):
        for v in range(y - width, y + width + 1):
            for u in range(x - width, x + width + 1):
                inside = 0 <= v < height and 0 <= u < length
                result[y, x] |= not inside or not mask[v, u]
    return result


def random_mask(rng, size):
    """Overlapping discs with a hole, or noise, often cut by the border."""
    if rng.random() < 0.2:
        return rng.random(size) < 0.8
    y, x = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, bool)
    for _ in range(3):
        cy, cx = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        mask |= (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(2, size[0] / 2) ** 2
    mask[rng.integers(size[0]), rng.integers(size[1])] = False
    return mask


@pytest.mark.parametrize("size, width", [((12, 9), 1), ((40, 60), 1), ((90, 120), 3), ((1, 1), 1)])
def test_the_width_is_two_percent_of_the_diagonal_and_at_least_one_pixel(size, width):
    assert boundary_width(size) == width


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.02, 0.06])
def test_boundaries_are_what_sees_the_outside(seed, ratio):
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 45)), int(rng.integers(20, 60)))
    mask = random_mask(rng, size)
    expected = boundary_by_pixel(mask, max(1, round(ratio * (size[0] ** 2 + size[1] ** 2) ** 0.5)))
    found = mask_boundary(mask, ratio)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    rle = boundary_rle(mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)), ratio)
    np.testing.assert_array_equal(mask_util.decode(rle), expected)


def test_an_empty_mask_has_no_boundary_and_a_full_one_a_frame():
    empty, full = np.zeros((10, 12), bool), np.ones((10, 12), bool)
    assert not mask_boundary(empty).any()
    frame = full.copy()
    frame[1:-1, 1:-1] = False
    np.testing.assert_array_equal(mask_boundary(full), frame)


def test_boundary_iou_is_that_of_the_boundaries():
    rng = np.random.default_rng(1)
    first, second = random_mask(rng, (40, 50)), random_mask(rng, (40, 50))
    a, b = boundary_by_pixel(first, 1), boundary_by_pixel(second, 1)
    assert 0 < boundary_iou(first, second) == (a & b).sum() / (a | b).sum() < 1
    assert boundary_iou(first, first) == 1.0
    assert boundary_iou(np.zeros((4, 4)), np.zeros((4, 4))) == 0.0


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


class ByPixel(COCOeval):
    """pycocotools whose overlaps are computed here, mask by mask."""

    def computeIoU(self, image_id, category_id):  # noqa: N802
        truth, found = self._gts[image_id, category_id], self._dts[image_id, category_id]
        found = sorted(found, key=lambda d: -d["score"])[:100]
        if not truth or not found:
            return []
        table = np.zeros((len(found), len(truth)))
        for row, d in enumerate(found):
            mask = mask_util.decode(d["segmentation"]).astype(bool)
            for column, g in enumerate(truth):
                other = mask_util.decode(g["segmentation"]).astype(bool)
                both = (mask & other).sum()
                if g["iscrowd"]:
                    table[row, column] = both / mask.sum()
                    continue
                width = max(1, round(0.02 * (mask.shape[0] ** 2 + mask.shape[1] ** 2) ** 0.5))
                near, far = boundary_by_pixel(mask, width), boundary_by_pixel(other, width)
                table[row, column] = min(
                    both / (mask | other).sum(), (near & far).sum() / (near | far).sum()
                )
        return table


def random_set(seed, size=(30, 40)):
    """(GroundTruth, detections, the same for pycocotools) of three images and two classes."""
    rng = np.random.default_rng(seed)
    images, detections, entries, results = [], [], [], []
    for number in range(1, 4):
        objects = [
            {
                "label": int(rng.integers(2)),
                "mask": random_mask(rng, size),
                "iscrowd": int(rng.random() < 0.3),
            }
            for _ in range(3)
        ]
        annotations = []
        for o in objects:
            rle = encode(o["mask"])
            annotation = {
                "bbox": mask_util.toBbox(rle).tolist(),
                "segmentation": rle,
                "area": float(mask_util.area(rle)),
                "iscrowd": o["iscrowd"],
            }
            annotations.append({**annotation, "label": o["label"]})
            entries.append(
                {
                    **annotation,
                    "id": len(entries) + 1,
                    "image_id": number,
                    "category_id": o["label"],
                }
            )
        images.append(TruthImage(number, size, annotations))
        masks, labels, scores = [], [], []
        for _ in range(8):
            o = objects[rng.integers(3)]
            move = rng.integers(-1, 2, 2) * int(rng.random() < 0.6)
            masks.append(np.roll(o["mask"], move, (0, 1)))
            labels.append(o["label"])
            scores.append(float(np.float32(rng.integers(1, 9) / 10)))
        codes = [encode(mask) for mask in masks]
        for code, label, score in zip(codes, labels, scores):
            results.append(
                {"image_id": number, "category_id": label, "segmentation": code, "score": score}
            )
        detections.append(
            ImageDetections(
                number,
                size,
                np.zeros((8, 4), np.float32),
                np.array(scores, np.float32),
                np.array(labels),
                [code["counts"] for code in codes],
            )
        )
    truth = GroundTruth(images, ["a", "b"], [0, 1])
    sizes = [{"id": n, "height": size[0], "width": size[1]} for n in range(1, 4)]
    plain = {
        "info": {},
        "images": sizes,
        "annotations": entries,
        "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
    }
    return truth, detections, plain, results


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_boundary_ap_is_coco_ap_with_the_smaller_of_both_overlaps(seed, implementation):
    truth, detections, plain, results = random_set(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = plain
        coco.createIndex()
        expected = ByPixel(coco, coco.loadRes(results), "segm")
        expected.evaluate()
        expected.accumulate()
    tables = evaluate_coco(truth, detections, "boundary", implementation)
    np.testing.assert_allclose(tables.precision, expected.eval["precision"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(tables.recall, expected.eval["recall"], rtol=0, atol=1e-9)
    masks = evaluate_coco(truth, detections, "segm", implementation)
    assert tables.precision.max() > 0
    assert (
        tables.precision[tables.precision > -1].mean()
        < masks.precision[masks.precision > -1].mean()
    )


def one_image(truth_mask, masks):
    """(GroundTruth, detections) of one object and some detections by descending score."""
    rle, size = encode(truth_mask), truth_mask.shape
    annotation = {
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": rle,
        "area": float(mask_util.area(rle)),
        "iscrowd": 0,
        "label": 0,
    }
    found = ImageDetections(
        1,
        size,
        np.zeros((len(masks), 4), np.float32),
        np.linspace(1, 0.1, len(masks), dtype=np.float32),
        np.zeros(len(masks), np.int64),
        [encode(mask)["counts"] for mask in masks],
    )
    return GroundTruth([TruthImage(1, size, [annotation])], ["a"], [1]), [found]


def disc(radius):
    y, x = np.mgrid[:40, :40]
    return (y - 20) ** 2 + (x - 20) ** 2 <= radius**2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_ring_with_the_outline_of_a_disc_is_not_the_disc(implementation):
    """Here mask IoU is the smaller one: both have their outline in common, but not the inside."""
    whole, ring = disc(15), disc(15) & ~disc(13)
    masks = (whole & ring).sum() / (whole | ring).sum()
    assert masks < 0.5 < boundary_iou(whole, ring)
    truth, found = one_image(whole, [ring])
    assert evaluate_coco(truth, found, "boundary", implementation).precision.max() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_hundred_best_detections_of_an_image_count(implementation):
    tables = [
        evaluate_coco(
            *one_image(disc(15), [disc(5)] * wrong + [disc(15)]), "boundary", implementation
        )
        for wrong in (99, 110)
    ]
    assert tables[0].precision[0, 0, 0, 0, -1] == pytest.approx(0.01)
    assert tables[1].precision[0, 0, 0, 0, -1] == 0
