"""Copy-paste: who covers whom, computed pixel by pixel, and which image gives the objects."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from d2ext.data import (
    CopyPaste,
    InstanceSegMapper,
    LargeScaleJitter,
    build_train_loader,
    get_dataset_records,
)
from d2ext.data.loader import MappedRecords, UnreadableImageError
from d2ext.errors import UserError

from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances, PolygonMasks

IGNORED = 255


def make_sample(masks, classes, value, num_labels=9):
    """A mapped image of one colour: all its pixels are `value`, its labels those of its masks."""
    masks = np.asarray(masks, bool)
    instances = Instances(masks.shape[1:])
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    labels = np.full(masks.shape[1:], num_labels)
    for mask, label in zip(masks, classes):
        labels[mask] = label
    image = torch.full((3, *masks.shape[1:]), value, dtype=torch.uint8)
    return {"image": image, "instances": instances, "sem_seg": torch.from_numpy(labels)}


def random_scene(draw, value):
    """Up to five rectangles with random holes, some of them hardly visible."""
    height, width = draw.integers(1, 20, 2)
    count = int(draw.integers(0, 6))
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        y, x = draw.integers(0, height), draw.integers(0, width)
        h, w = draw.integers(1, height + 1), draw.integers(1, width + 1)
        part = mask[y : y + h, x : x + w]
        part[:] = draw.random(part.shape) < 0.8
        part[0, 0] = True
    return make_sample(masks, draw.integers(0, 9, count).tolist(), value)


def tight_box(mask):
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def occlude(target, source, chosen, min_visible, min_area):
    """The expected masks, classes, image and labels, one pixel and object after the other."""
    height, width = target["sem_seg"].shape
    objects = source["instances"]
    pasted = []
    for row in chosen:
        whole = objects.gt_masks.tensor[row].numpy()
        inside = np.zeros((height, width), bool)
        for y, x in zip(*np.nonzero(whole)):
            if y < height and x < width:
                inside[y, x] = True
        enough = inside.sum() >= max(min_visible * whole.sum(), min_area, 1)
        if inside.any() and (enough or inside.sum() == whole.sum()):
            pasted.append((inside, int(objects.gt_classes[row])))
    image, labels = target["image"].numpy().copy(), target["sem_seg"].numpy().copy()
    kept = []
    for mask, label in zip(target["instances"].gt_masks.tensor, target["instances"].gt_classes):
        before = after = mask.numpy().copy()
        for cover, _ in pasted:
            after = after & ~cover
        enough = after.sum() >= max(min_visible * before.sum(), min_area, 1)
        if after.sum() == before.sum() or enough:
            kept.append((after, int(label)))
    for cover, _ in pasted:
        for y, x in zip(*np.nonzero(cover)):
            image[:, y, x] = source["image"][:, y, x]
            labels[y, x] = source["sem_seg"][y, x]
    return kept + pasted, image, labels


class Chosen:
    """A generator that pastes given objects."""

    def __init__(self, rows):
        self.rows = rows

    def integers(self, low, high):
        assert low <= len(self.rows) < high
        return len(self.rows)

    def choice(self, count, size, replace):
        assert max(self.rows) < count and size == len(self.rows) and not replace
        return np.array(self.rows)


def test_occlusion_in_random_scenes_is_that_of_painting_by_hand():
    draw = np.random.default_rng(0)
    dropped = pastes = other_sizes = 0
    for _ in range(400):
        target, source = random_scene(draw, 10), random_scene(draw, 200)
        number = len(source["instances"])
        min_visible, min_area = float(draw.choice([0.0, 0.3])), int(draw.choice([0, 5]))
        paste = CopyPaste(prob=1.0, min_visible=min_visible, min_area=min_area)
        if not number:
            assert paste(target, source, draw) is target
            continue
        rows = sorted(draw.choice(number, draw.integers(1, number + 1), replace=False).tolist())
        before = copy.deepcopy(target)
        out = paste(target, source, Chosen(rows))
        expected, image, labels = occlude(target, source, rows, min_visible, min_area)
        found = out["instances"]
        assert found.gt_classes.tolist() == [label for _, label in expected]
        for (mask, _), own, box in zip(expected, found.gt_masks.tensor, found.gt_boxes.tensor):
            np.testing.assert_array_equal(own.numpy(), mask)
            assert box.tolist() == tight_box(mask)
        np.testing.assert_array_equal(out["image"].numpy(), image)
        np.testing.assert_array_equal(out["sem_seg"].numpy(), labels)
        assert out["image"].dtype == torch.uint8 and out["sem_seg"].dtype == torch.int64
        for name in ("image", "sem_seg"):
            assert torch.equal(target[name], before[name])
        assert torch.equal(target["instances"].gt_masks.tensor, before["instances"].gt_masks.tensor)
        dropped += len(expected) < len(rows) + len(before["instances"])
        pastes += out is not target
        other_sizes += image.shape != tuple(source["image"].shape)
    assert min(dropped, pastes, other_sizes) > 50


def block(y0, x0, y1, x1, size=(10, 10)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


NEW = make_sample([block(0, 0, 10, 5)], [2], 200)
PASTE = CopyPaste(prob=1.0)


def test_an_object_that_is_covered_entirely_is_left_out():
    target = make_sample([block(2, 1, 4, 3), block(2, 6, 4, 8)], [0, 1], 10)
    out = PASTE(target, NEW, np.random.default_rng(0))["instances"]
    assert out.gt_classes.tolist() == [1, 2] and len(out.gt_boxes) == len(out.gt_masks) == 2


@pytest.mark.parametrize("min_visible, classes", [(0.2, [0, 2]), (0.21, [2])])
def test_an_object_that_is_covered_nearly_entirely_is_left_out(min_visible, classes):
    target = make_sample([block(0, 1, 2, 6)], [0], 10)
    paste = CopyPaste(prob=1.0, min_visible=min_visible)
    out = paste(target, NEW, np.random.default_rng(0))["instances"]
    assert out.gt_classes.tolist() == classes


def test_an_image_without_objects_receives_some_and_one_without_gives_none():
    empty = make_sample(np.zeros((0, 10, 10)), [], 10)
    out = PASTE(empty, NEW, np.random.default_rng(0))
    assert out["instances"].gt_boxes.tensor.tolist() == [[0, 0, 5, 10]]
    assert PASTE(NEW, empty, np.random.default_rng(0)) is NEW
    assert PASTE(empty, empty, np.random.default_rng(0)) is empty


def test_crowd_regions_are_painted_over():
    target = make_sample([block(0, 0, 1, 1)], [0], 10)
    target["sem_seg"][:] = IGNORED
    labels = PASTE(target, NEW, np.random.default_rng(0))["sem_seg"]
    assert (labels[:, :5] == 2).all() and (labels[:, 5:] == IGNORED).all()


def test_maps_of_a_data_set_give_their_own_labels():
    """Which need not be the classes: in the panoptic maps of COCO every thing has the label 0."""
    source = copy.deepcopy(NEW)
    source["sem_seg"][:] = 7
    target = make_sample([block(0, 6, 3, 9)], [0], 10)
    labels = PASTE(target, source, np.random.default_rng(0))["sem_seg"]
    assert (labels[:, :5] == 7).all() and (labels[:3, 6:9] == 0).all()


def test_images_without_a_map_have_none_after_it():
    target, source = copy.deepcopy(NEW), copy.deepcopy(NEW)
    del target["sem_seg"], source["sem_seg"]
    assert "sem_seg" not in PASTE(target, source, np.random.default_rng(0))


def test_polygons_become_bitmaps_and_keep_the_boxes_of_whole_objects():
    polygons = [[np.array([1.0, 1.0, 4.0, 1.0, 4.0, 4.0])], [np.array([6.2, 6, 9.7, 6, 9.7, 9])]]
    target = make_sample([block(0, 0, 1, 1)] * 2, [0, 1], 10)
    instances = target["instances"]
    instances.gt_masks = PolygonMasks(polygons)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    out = PASTE(target, make_sample([block(0, 0, 2, 5)], [2], 200), np.random.default_rng(0))
    found = out["instances"]
    assert isinstance(found.gt_masks, BitMasks) and found.gt_classes.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.gt_boxes.tensor[1], [6.2, 6, 9.7, 9], rtol=1e-6)
    assert found.gt_boxes.tensor[0].tolist() == tight_box(found.gt_masks.tensor[0].numpy())


def test_number_of_pasted_objects_is_random_up_to_the_most():
    source = make_sample([block(i, 0, i + 1, 10) for i in range(8)], list(range(8)), 200)
    empty = make_sample(np.zeros((0, 10, 10)), [], 10)
    draw = np.random.default_rng(0)
    for most in (3, 100):
        paste = CopyPaste(prob=1.0, max_objects=most)
        sets = [paste(empty, source, draw)["instances"].gt_classes.tolist() for _ in range(200)]
        assert {len(x) for x in sets} == set(range(1, min(most, 8) + 1))
        assert set(itertools.chain(*sets)) == set(range(8))
        assert all(len(set(x)) == len(x) for x in sets)


def test_fields_that_cannot_be_cut_are_refused():
    target = copy.deepcopy(NEW)
    target["instances"].gt_keypoints = torch.zeros(1, 3, 3)
    with pytest.raises(UserError, match="copy-paste cannot cut gt_keypoints"):
        PASTE(target, NEW, np.random.default_rng(0))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"prob": 1.5}, r"INPUT.COPY_PASTE.PROB is 1.5; it has to lie in 0..1"),
        ({"min_visible": -0.1}, "MIN_VISIBLE is -0.1"),
        ({"max_objects": 0}, "MAX_OBJECTS is 0; at least 1"),
    ],
)
def test_settings_out_of_range_are_named(options, match):
    with pytest.raises(UserError, match=match):
        CopyPaste(**options)


def _mapper(**options):
    options = {"augmentations": [LargeScaleJitter(64), T.RandomFlip()], **options}
    return InstanceSegMapper(True, semantic="instances", num_classes=8, **options)


def _samples(name, count=12, **options):
    options = {"total_batch_size": 2, "seed": 3, "copy_paste": PASTE, **options}
    loader = build_train_loader(name, mapper=_mapper(), **options)
    return list(itertools.chain(*itertools.islice(loader, count)))


def _assert_same(first, second):
    assert first["sample_seed"] == second["sample_seed"]
    for name in ("image", "sem_seg"):
        assert torch.equal(first[name], second[name])
    first, second = first["instances"], second["instances"]
    assert torch.equal(first.gt_masks.tensor, second.gt_masks.tensor)
    assert torch.equal(first.gt_boxes.tensor, second.gt_boxes.tensor)
    assert torch.equal(first.gt_classes, second.gt_classes)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"start_iter": 7}])
def test_workers_and_resuming_give_the_same_images(shapes_few, options):
    whole = _samples(shapes_few)
    start = options.get("start_iter", 0)
    rest = _samples(shapes_few, 12 - start, **options)
    for first, second in zip(whole[2 * start :], rest, strict=True):
        _assert_same(first, second)


def test_objects_of_several_images_are_pasted_with_their_augmentation(shapes_few):
    plain, pasted = _samples(shapes_few, copy_paste=None), _samples(shapes_few)
    for first, second in zip(plain, pasted):
        changed = (first["image"] != second["image"]).any(0)
        assert first["image_id"] == second["image_id"]
        assert changed.float().mean() < 1
    more = sum(len(x["instances"]) for x in pasted) - sum(len(x["instances"]) for x in plain)
    assert more > len(plain)
    for sample in pasted:
        instances = sample["instances"]
        for box, mask in zip(instances.gt_boxes.tensor, instances.gt_masks.tensor.numpy()):
            assert box.tolist() == tight_box(mask)


def test_share_of_images_is_the_probability(shapes_few):
    plain = _samples(shapes_few, 40, copy_paste=None)
    some = _samples(shapes_few, 40, copy_paste=CopyPaste(prob=0.4))
    share = np.mean([not torch.equal(a["image"], b["image"]) for a, b in zip(plain, some)])
    assert 0.2 < share < 0.55


def _record(index, crowd=False):
    annotations = [{"iscrowd": int(crowd), "category_id": 0}]
    return {"image_id": index, "width": 10, "height": 10, "annotations": annotations}


class Recorder:
    """A mapper that remembers what it was given; records 2 and 3 cannot be read."""

    def __init__(self):
        self.given = []

    def __call__(self, record):
        self.given.append((record["image_id"], record["sample_seed"]))
        if record["image_id"] in (2, 3):
            raise UnreadableImageError(f"{record['image_id']} is lost")
        return {**copy.deepcopy(NEW), "image_id": record["image_id"]}


def test_images_that_give_objects_have_some_and_are_replaced_when_unreadable():
    mapper = Recorder()
    records = [_record(i, crowd=i < 2) for i in range(6)]
    data = MappedRecords(records, mapper, [0] * 6, PASTE)
    lost, sources, seeds = set(), set(), set()
    for seed in range(60):
        mapper.given.clear()
        out = data[0, seed]
        again = list(mapper.given)
        mapper.given.clear()
        data[0, seed]
        assert mapper.given == again and mapper.given[0] == (0, seed)
        assert out["image_id"] == 0
        lost.update(out.get("unreadable_images", ()))
        sources.add(mapper.given[-1][0])
        seeds.update(s for _, s in mapper.given[1:])
    assert lost == {"2 is lost", "3 is lost"} and sources == {4, 5}
    assert len(seeds) == 60 and not seeds & set(range(60))
    lost = MappedRecords(records[:4], mapper, [0] * 4, PASTE)
    with pytest.raises(UserError, match="is lost; nor can 9 others be"):
        lost[0, 0]


def test_nothing_else_is_loaded_when_it_is_off_or_no_image_has_objects():
    for records, paste in (
        ([_record(0), _record(4)], CopyPaste()),
        ([_record(0), _record(4)], None),
        ([_record(0, crowd=True), {**_record(4), "annotations": []}], PASTE),
    ):
        mapper = Recorder()
        MappedRecords(records, mapper, [0, 0], paste)[1, 9]
        assert mapper.given == [(4, 9)]


def test_unreadable_images_are_counted_wherever_they_come_from(shapes_few, tmp_path, caplog):
    records = copy.deepcopy(get_dataset_records(shapes_few, filter_empty=True))
    path = tmp_path / "broken.png"
    path.write_bytes(Path(records[3]["file_name"]).read_bytes()[:-100])
    records[3]["file_name"] = str(path)
    _samples(records, 30)
    lines = [r.getMessage() for r in caplog.records if r.name == "d2ext.data.loader"]
    assert len(lines) == 1 and "broken.png" in lines[0] and "1 of at most 10" in lines[0]
