"""COCO's AP and AR against pycocotools itself on random detections, with both implementations."""

import contextlib
import copy
import io
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2ext.errors import UserError
from d2ext.evaluation import InstanceEvaluator, coco_metrics, evaluate_coco
from d2ext.evaluation.coco_scores import IMPLEMENTATIONS, class_rows, default_implementation
from d2ext.evaluation.ground_truth import by_image, load_ground_truth
from d2ext.evaluation.predictions import collect, write_results

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

SIZE = (120, 150)
# In the order of COCOeval.stats.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl")


def ellipse(rng):
    height, width = SIZE
    y, x = np.mgrid[:height, :width]
    ry, rx = rng.uniform(2, 60, 2)
    cy, cx = rng.uniform(0, height), rng.uniform(0, width)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def shifted(rng, mask):
    return np.roll(mask, rng.integers(-6, 7, 2), axis=(0, 1))


def rle_of(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def annotation_of(number, image_id, category, mask, crowd):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation = rle_of(mask)
    if crowd:  # uncompressed codes, as COCO has them
        runs, previous, counts = mask.T.flatten(), 0, [0]
        for value in runs.astype(int).tolist():
            if value != previous:
                counts.append(0)
                previous = value
            counts[-1] += 1
        segmentation = {"size": list(mask.shape), "counts": counts}
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": mask_util.toBbox(rle).tolist(),
        "area": float(mask_util.area(rle)),
        "iscrowd": int(crowd),
        "segmentation": segmentation,
    }


def instances_of(objects):
    instances = Instances(SIZE)
    masks = np.array([mask for _, mask, _ in objects]).reshape(-1, *SIZE)
    boxes = [
        mask_util.toBbox(mask_util.encode(np.asfortranarray(m.astype(np.uint8)))) for m in masks
    ]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(torch.from_numpy(boxes))
    instances.scores = torch.tensor([s for _, _, s in objects], dtype=torch.float32)
    instances.pred_classes = torch.tensor([c for c, _, _ in objects], dtype=torch.int64)
    instances.pred_masks = torch.from_numpy(masks)
    return instances


def random_data(seed, num_images=6, many=False):
    """(COCO dict, {image id: [(contiguous class, mask, score), ...]}); categories 2, 5 and 9."""
    rng = np.random.default_rng(seed)
    categories = [2, 5, 9]
    images, annotations, found = [], [], {}
    for number in rng.permutation(num_images).tolist():
        image_id = 3 * number + 1
        images.append({"id": image_id, "file_name": f"{number}.png", "height": 120, "width": 150})
        masks = []
        for _ in range(int(rng.integers(0, 5))):
            mask, label = ellipse(rng), int(rng.integers(2 if seed % 2 else 3))
            if not mask.any():
                continue
            crowd = bool(rng.random() < 0.25)
            masks.append((label, mask))
            annotations.append(
                annotation_of(len(annotations) + 1, image_id, categories[label], mask, crowd)
            )
        objects = []
        for _ in range(150 if many and number == 0 else int(rng.integers(0, 9))):
            label, mask = int(rng.integers(3)), ellipse(rng)
            if masks and rng.random() < 0.7:
                label, mask = masks[rng.integers(len(masks))]
                mask = shifted(rng, mask)
            if mask.any():
                objects.append((label, mask, float(rng.integers(1, 12)) / 12))
        found[image_id] = objects
    data = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
    }
    return data, found


@pytest.fixture
def register(tmp_path):
    """Register a COCO dict as the data set `random`."""

    def run(data, **metadata):
        path = tmp_path / "random.json"
        path.write_text(json.dumps(data))
        DatasetCatalog.register("random", list)
        MetadataCatalog.get("random").set(json_file=str(path), evaluator_type="coco", **metadata)
        return str(path)

    return run


def reference(json_file, results, kind):
    """pycocotools alone: (stats, precision table)."""
    results = copy.deepcopy(results)
    for result in results:
        if kind == "segm":
            del result["bbox"]
        else:
            del result["segmentation"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats, evaluation.eval["precision"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_random_detections_score_as_with_pycocotools(
    register, tmp_path, seed, implementation, kind
):
    data, found = random_data(seed, many=seed == 0)
    json_file = register(data)
    truth = load_ground_truth("random")
    detections = [collect(instances_of(objects), i) for i, objects in found.items()]
    write_results(detections, truth.category_ids, str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    stats, precision = reference(json_file, results, kind)
    tables = evaluate_coco(truth, by_image(truth, detections), kind, implementation)
    np.testing.assert_allclose(tables.precision, precision, rtol=0, atol=1e-9)
    metrics = coco_metrics(tables, truth.class_names)
    for name, expected in zip(NAMES, stats):
        if expected < 0:
            assert np.isnan(metrics[name])
        else:
            assert metrics[name] == pytest.approx(expected, abs=1e-6), name
    assert 0 < metrics["AP"] < 100
    for row, (index, name) in zip(class_rows(tables, truth.class_names), enumerate(["c2", "c5"])):
        own = precision[:, :, index, 0, -1]
        expected = 100 * own[own > -1].mean() if (own > -1).any() else float("nan")
        assert metrics[f"AP-{name}"] == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert row[:2] == [name, pytest.approx(expected, abs=1e-6, nan_ok=True)]


@pytest.mark.parametrize("kind", ["bbox", "segm", "boundary"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_are_ranked_by_scores_of_their_own_and_boxes_by_theirs(
    register, tmp_path, implementation, kind
):
    data, found = random_data(0, many=True)  # more detections in an image than count
    json_file = register(data)
    truth, rng = load_ground_truth("random"), np.random.default_rng(5)
    detections, renamed = [], []
    for image_id, objects in found.items():
        instances = instances_of(objects)
        instances.mask_scores = torch.from_numpy(rng.random(len(objects)) - 0.2)  # any real number
        detections.append(collect(instances, image_id))
        instances.scores = instances.mask_scores
        instances.remove("mask_scores")
        renamed.append(collect(instances, image_id))
    tables = evaluate_coco(truth, by_image(truth, detections), kind, implementation)
    if kind == "boundary":  # pycocotools has none, but it is tested with one kind of scores
        precision = evaluate_coco(truth, by_image(truth, renamed), kind, implementation).precision
    else:
        write_results(detections, truth.category_ids, str(tmp_path / "results.json"))
        results = json.loads((tmp_path / "results.json").read_text())
        for result in results:
            mask_score = result.pop("mask_score")
            result["score"] = mask_score if kind == "segm" else result["score"]
        _, precision = reference(json_file, results, kind)
    np.testing.assert_allclose(tables.precision, precision, rtol=0, atol=1e-9)
    plain = [image._replace(mask_scores=None) for image in detections]
    by_box = evaluate_coco(truth, by_image(truth, plain), kind, implementation).precision
    assert np.array_equal(tables.precision, by_box) == (kind == "bbox")


def test_results_without_mask_scores_are_written_without_them(tmp_path):
    write_results([collect(instances_of([(0, np.ones(SIZE), 0.5)]), 1)], [1], tmp_path / "r.json")
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["score"] == 0.5 and "mask_score" not in result


@pytest.mark.parametrize(
    ("mask_scores", "words"), [([float("nan")], "mask score"), ([[0.5]], "one number each")]
)
def test_broken_mask_scores_are_named(mask_scores, words):
    instances = instances_of([(0, np.ones(SIZE), 0.5)])
    instances.mask_scores = torch.tensor(mask_scores)
    with pytest.raises(UserError, match=words):
        collect(instances, 7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bbox", "segm", "boundary"])
def test_more_than_a_hundred_detections_of_an_image_count_if_the_model_may_find_them(
    register, implementation, kind
):
    masks = []
    for top in range(0, 100, 10):
        for left in range(0, 140, 7):
            mask = np.zeros(SIZE, bool)
            mask[top : top + 5, left : left + 4] = True
            masks.append(mask)
    assert len(masks) == 200
    data, _ = random_data(1)
    data["images"] = data["images"][:1]
    image_id, category = data["images"][0]["id"], data["categories"][0]["id"]
    data["annotations"] = [
        annotation_of(i + 1, image_id, category, mask, False) for i, mask in enumerate(masks)
    ]
    register(data)
    truth = load_ground_truth("random")
    perfect = [collect(instances_of([(0, m, 1 - i / 1e3) for i, m in enumerate(masks)]), image_id)]
    for limit, wanted, name in ((100, 100 * 51 / 101, "AR@100"), (200, 100, "AR@200"),
                                (-1, 100, "AR@200"), (50, 100 * 51 / 101, "AR@100")):  # fmt: skip
        tables = evaluate_coco(
            truth, by_image(truth, perfect), kind, implementation, max_detections=limit
        )
        metrics = coco_metrics(tables, truth.class_names)
        assert metrics["AP"] == pytest.approx(wanted)
        assert metrics[name] == pytest.approx(50 if name == "AR@100" else 100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_annotation_numbered_zero_is_found_like_any_other(register, implementation):
    data, _ = random_data(1)
    for number, annotation in enumerate(data["annotations"]):
        annotation.update(id=number, iscrowd=0)
    register(data)
    truth = load_ground_truth("random")
    perfect = []
    for image in truth.images:
        objects = [
            (a["label"], mask_util.decode(truth.rle(image, a)).astype(bool), 0.9)
            for a in image.annotations
        ]
        perfect.append(collect(instances_of(objects), image.image_id))
    tables = evaluate_coco(truth, by_image(truth, perfect), "segm", implementation)
    assert coco_metrics(tables, truth.class_names)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_found_is_zero_and_nothing_to_find_is_nan(register, implementation):
    data, _ = random_data(1)  # no object of the third class
    register(data)
    truth = load_ground_truth("random")
    for kind in ("bbox", "segm", "boundary"):
        tables = evaluate_coco(truth, [None] * len(truth.images), kind, implementation)
        metrics = coco_metrics(tables, truth.class_names)
        assert metrics["AP"] == metrics["AR@100"] == metrics["AP-c2"] == 0.0
        assert np.isnan(metrics["AP-c9"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fields_that_files_often_lack_are_filled_in(register, implementation):
    data, found = random_data(4)
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 0
    register(copy.deepcopy(data))
    expected = load_ground_truth("random")
    DatasetCatalog.remove("random"), MetadataCatalog.remove("random")
    for annotation in data["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    register(data)
    truth = load_ground_truth("random")
    assert [i.annotations for i in truth.images] == [i.annotations for i in expected.images]
    detections = [collect(instances_of(objects), i) for i, objects in found.items()]
    tables = [
        evaluate_coco(t, by_image(t, detections), "segm", implementation) for t in (truth, expected)
    ]
    np.testing.assert_array_equal(tables[0].precision, tables[1].precision)


def test_images_may_be_named_by_text(register):
    data, found = random_data(2)
    register(copy.deepcopy(data))
    numbers = load_ground_truth("random")
    DatasetCatalog.remove("random"), MetadataCatalog.remove("random")
    for image in data["images"]:
        image["id"] = f"{image['id']:03d}"
    for annotation in data["annotations"]:
        annotation["image_id"] = f"{annotation['image_id']:03d}"
    register(data)
    texts = load_ground_truth("random")
    results = []
    for truth, form in ((numbers, int), (texts, "{:03d}".format)):
        detections = [collect(instances_of(objects), form(i)) for i, objects in found.items()]
        results.append(evaluate_coco(truth, by_image(truth, detections), "segm").precision)
    np.testing.assert_array_equal(*results)


def test_polygons_are_compared_as_the_regions_they_enclose(register):
    data, _ = random_data(2, num_images=1)
    (image,) = data["images"]
    polygon = [[10.0, 10.0, 60.0, 10.0, 60.0, 50.0, 10.0, 50.0], [80.0, 10.0, 90.0, 10.0, 85.0, 30]]
    mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygon, *SIZE))).astype(bool)
    entry = annotation_of(1, image["id"], 2, mask, False)
    data["annotations"] = [{**entry, "segmentation": polygon}]
    register(data)
    truth = load_ground_truth("random")
    found = by_image(truth, [collect(instances_of([(0, mask, 0.5)]), image["id"])])
    for kind in ("bbox", "segm", "boundary"):
        assert coco_metrics(evaluate_coco(truth, found, kind), ["c2"])["AP"] == pytest.approx(100)


def test_pycocotools_is_the_fallback(monkeypatch):
    import importlib.util

    assert default_implementation() == "faster-coco-eval"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "faster" in name else find(name)
    )
    assert default_implementation() == "pycocotools"


def test_the_evaluator_gives_these_numbers(register):
    data, found = random_data(3)
    register(data, thing_classes=["c2", "c5", "c9"])
    evaluator = InstanceEvaluator("random", ("coco", "boundary", "voc_sds"))
    for image_id, objects in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances_of(objects)}])
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "segm", "boundary", "voc_sds"]
    truth = load_ground_truth("random")
    detections = by_image(
        truth, [collect(instances_of(objects), i) for i, objects in found.items()]
    )
    for kind in ("bbox", "segm", "boundary"):
        expected = coco_metrics(evaluate_coco(truth, detections, kind), truth.class_names)
        assert results[kind] == pytest.approx(expected, nan_ok=True)
    assert 0 < results["boundary"]["AP"] < results["segm"]["AP"]
