"""InstanceSegMapper: output fields, semantic sources, reproducible augmentation, error messages."""

import copy
import logging
import random

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import InstanceSegMapper
from d2ext.data import mapper as mapper_module
from d2ext.data.random_state import seeded_generators
from d2ext.errors import UserError

from detectron2.config import LazyCall, instantiate
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks


@pytest.fixture
def records(shapes_few):
    return DatasetCatalog.get(shapes_few)


def _mapper(is_train=True, **kwargs):
    kwargs = {"augmentations": [], "num_classes": 8, **kwargs}
    return InstanceSegMapper(is_train, **kwargs)


@pytest.fixture
def polygon_record(tmp_path):
    """A 20 x 30 image with a square of class 1, a triangle of class 0 on it and a crowd RLE."""
    path = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    crowd = np.zeros((20, 30), np.uint8, order="F")
    crowd[:, 25:] = 1
    annotations = [
        {"bbox": [2, 2, 12, 12], "category_id": 1, "segmentation": [[2, 2, 14, 2, 14, 14, 2, 14]]},
        {"bbox": [4, 4, 6, 6], "category_id": 0, "segmentation": [[4, 4, 10, 4, 4, 10]]},
        {"bbox": [25, 0, 5, 20], "category_id": 0, "segmentation": mask_util.encode(crowd)},
    ]
    for index, annotation in enumerate(annotations):
        annotation.update(bbox_mode=BoxMode.XYWH_ABS, iscrowd=int(index == 2), id=10 + index)
    return {
        "file_name": str(path),
        "image_id": 1,
        "height": 20,
        "width": 30,
        "annotations": annotations,
    }


def test_training_output_has_the_promised_fields(records):
    out = _mapper()(records[0])
    height, width = records[0]["height"], records[0]["width"]
    assert out["image"].shape == (3, height, width) and out["image"].dtype == torch.uint8
    assert out["sem_seg"].shape == (height, width) and out["sem_seg"].dtype == torch.uint8
    assert isinstance(out["instances"].gt_masks, BitMasks)
    assert len(out["instances"]) == len(records[0]["annotations"]) > 0
    assert (out["height"], out["width"]) == (height, width)
    assert "annotations" not in out and "sample_seed" not in out


def test_boxes_of_bitmasks_are_tight_around_the_augmented_masks(records):
    out = _mapper(augmentations=[T.RandomCrop("relative", (0.6, 0.6))])(records[1])
    instances = out["instances"]
    assert len(instances) > 0
    for box, mask in zip(instances.gt_boxes.tensor.tolist(), instances.gt_masks.tensor.numpy()):
        y, x = np.nonzero(mask)
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_image_without_objects_has_empty_fields(records):
    empty = next(r for r in records if not r["annotations"])
    for mask_format, structure in (("bitmask", BitMasks), ("polygon", PolygonMasks)):
        instances = _mapper(mask_format=mask_format)(empty)["instances"]
        assert len(instances) == 0 and len(instances.gt_boxes) == 0
        assert isinstance(instances.gt_masks, structure) and len(instances.gt_masks) == 0


def test_crowd_regions_are_no_instances(records):
    record = next(r for r in records if any(a["iscrowd"] for a in r["annotations"]))
    out = _mapper()(record)
    assert len(out["instances"]) == len(record["annotations"]) - 1


def test_data_set_map_follows_the_augmentation(records):
    expected = np.asarray(Image.open(records[0]["sem_seg_file_name"])).astype(int)
    out = _mapper(augmentations=[T.RandomFlip(prob=1.0)], semantic="dataset")(records[0])
    np.testing.assert_array_equal(out["sem_seg"].numpy(), expected[:, ::-1])


def test_semantic_modes(records, polygon_record):
    record = next(r for r in records if any(a["iscrowd"] for a in r["annotations"]))
    derived = _mapper(semantic="instances")(record)["sem_seg"]
    original = _mapper(semantic="auto")(record)["sem_seg"]
    assert {8, 255} <= set(derived.unique().tolist()) <= {*range(9), 255}
    # the derived map knows the same things, but not the stuff classes 8..11
    both = (derived < 8) & (original < 8)
    assert (derived[both] == original[both]).float().mean() > 0.9
    assert "sem_seg" not in _mapper(semantic="none")(record)
    assert "sem_seg" in _mapper(semantic="auto")(polygon_record)
    with pytest.raises(
        UserError, match="no semantic map for .*image.png; use semantic mode 'auto'"
    ):
        _mapper(semantic="dataset")(polygon_record)


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_derived_map_is_made_at_the_augmented_size(polygon_record, mask_format):
    mapper = _mapper(augmentations=[T.Resize((40, 60))], mask_format=mask_format, num_classes=2)
    labels = mapper(polygon_record)["sem_seg"]
    assert labels.shape == (40, 60)
    # corners of the two objects, the crowd and the background, in doubled coordinates
    assert labels[26, 26] == 1 and labels[10, 10] == 0 and labels[20, 55] == 255
    assert labels[35, 10] == 2
    triangle = (labels == 0).sum().item()
    assert abs(triangle - 4 * 18) < 20


def test_source_of_auto_mode_is_logged_once(polygon_record, caplog):
    mapper_module._log_derivation.cache_clear()
    mapper = _mapper(num_classes=2)
    with caplog.at_level(logging.INFO, logger="d2ext.data.mapper"):
        mapper(polygon_record)
        mapper(polygon_record)
    assert caplog.text.count("made of its instances") == 1


def test_polygon_format_keeps_polygons(polygon_record):
    instances = _mapper(mask_format="polygon", num_classes=2)(polygon_record)["instances"]
    assert isinstance(instances.gt_masks, PolygonMasks) and len(instances) == 2
    np.testing.assert_array_equal(instances.gt_boxes.tensor[0], [2, 2, 14, 14])


@pytest.mark.parametrize("semantic", ["dataset", "instances"])
def test_padding_and_rotation_are_ignored_in_the_map(records, semantic):
    augmentations = [T.FixedSizeCrop((180, 200)), T.RandomRotation([90], sample_style="choice")]
    labels = _mapper(augmentations=augmentations, semantic=semantic)(records[0])["sem_seg"]
    limit = 12 if semantic == "dataset" else 9
    assert labels.shape == (200, 180)
    assert set(labels.unique().tolist()) <= {*range(limit), 255}
    known = (labels != 255).sum().item() / (records[0]["height"] * records[0]["width"])
    assert 0.97 < known <= 1.0


def _augmented(mapper, record, seed):
    return mapper({**record, "sample_seed": seed})


def test_sample_seed_decides_the_augmentation(records):
    mapper = _mapper(
        augmentations=[
            T.ResizeShortestEdge((64, 120), 200, "range"),
            T.RandomFlip(),
            T.RandomBrightness(0.5, 1.5),
        ]
    )
    first = _augmented(mapper, records[0], 7)
    np.random.rand(5)  # the state of the global generator does not matter
    again = _augmented(mapper, records[0], 7)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["sem_seg"], again["sem_seg"])
    assert torch.equal(first["instances"].gt_masks.tensor, again["instances"].gt_masks.tensor)
    others = [_augmented(mapper, records[0], seed)["image"] for seed in (8, 7 + 2**40, 2**63 - 1)]
    assert not any(
        o.shape == first["image"].shape and torch.equal(o, first["image"]) for o in others
    )
    assert first["sample_seed"] == 7


def test_global_generators_are_restored():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyError), seeded_generators(123):
        inside = draw()
        raise KeyError
    assert draw() == expected
    with seeded_generators(123):
        assert draw() == inside
    with seeded_generators(124):
        assert all(a != b for a, b in zip(draw(), inside))


def test_record_is_not_modified(records):
    before = copy.deepcopy(records[0])
    _mapper(augmentations=[T.RandomFlip(prob=1.0)])(records[0])
    assert records[0] == before


def test_test_output_has_no_annotations(records):
    out = _mapper(is_train=False, num_classes=None)(records[0])
    assert set(out) == {"file_name", "image_id", "height", "width", "image"}


def test_rotated_by_exif_like_detectron2(tmp_path):
    path = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[274] = 6  # shown rotated by 90 degrees
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    record = {"file_name": str(path), "image_id": 1, "height": 30, "width": 20}
    out = _mapper()(record)
    assert out["image"].shape == (3, 30, 20)
    assert len(out["instances"]) == 0 and (out["sem_seg"] == 8).all()


def test_yaml_and_lazy_construction_agree(records):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.INPUT.SEMANTIC = 8, "auto"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 200
    from_yaml = InstanceSegMapper(cfg, True, num_semantic_labels=12)
    lazy = LazyCall(InstanceSegMapper)(
        is_train=True,
        augmentations=[
            LazyCall(T.ResizeShortestEdge)(
                short_edge_length=(96,), max_size=200, sample_style="choice"
            ),
            LazyCall(T.RandomFlip)(),
        ],
        num_classes=8,
        num_semantic_labels=12,
    )
    outs = [_augmented(m, records[2], 5) for m in (from_yaml, instantiate(lazy))]
    for field in ("image", "sem_seg"):
        assert torch.equal(outs[0][field], outs[1][field])
    assert torch.equal(*(o["instances"].gt_boxes.tensor for o in outs))


@pytest.mark.parametrize("mode", ["none", "dataset", "instances"])
def test_yaml_config_chooses_the_semantic_mode(mode):
    cfg = get_cfg()
    cfg.INPUT.SEMANTIC, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = mode, 9
    mapper = InstanceSegMapper(cfg, True)
    assert (mapper.semantic, mapper.num_semantic_labels) == (mode, 9)


def test_plain_detectron2_config_has_automatic_semantic_labels_without_a_limit():
    mapper = InstanceSegMapper(detectron2_cfg(), True)
    assert (mapper.semantic, mapper.num_semantic_labels) == ("auto", None)


def _expect_error(record, match, **kwargs):
    with pytest.raises(UserError, match=match) as info:
        _mapper(**kwargs)(record)
    assert "\n" not in str(info.value)


def test_unusable_images_are_named(records, tmp_path):
    missing = {**records[0], "file_name": str(tmp_path / "no.png")}
    _expect_error(missing, "cannot read image .*no.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    _expect_error({**records[0], "file_name": str(broken)}, "cannot read image .*broken.png")
    other = {**records[0], "file_name": records[1]["file_name"], "annotations": []}
    del other["sem_seg_file_name"]
    Image.new("RGB", (5, 6)).save(tmp_path / "small.png")
    other["file_name"] = str(tmp_path / "small.png")
    _expect_error(other, r"small.png, got \(5, 6\)")


def test_unusable_semantic_maps_are_named(records, tmp_path):
    path = str(tmp_path / "map.png")
    record = {**records[0], "sem_seg_file_name": path}
    _expect_error(record, "semantic map .*map.png does not exist")
    Image.new("L", (7, 8)).save(path)
    _expect_error(record, "semantic map .*map.png is 7x8, its image")
    Image.new("P", (record["width"], record["height"])).save(path)
    _expect_error(record, "map.png has mode P; it must be an 8-bit greyscale PNG")
    Image.new("L", (record["width"], record["height"]), 12).save(path)
    _expect_error(record, r"go up to 12, but the model has 12 labels", num_semantic_labels=12)
    assert (_mapper(num_semantic_labels=13)(record)["sem_seg"] == 12).all()


def test_unusable_masks_are_named(polygon_record):
    no_mask = copy.deepcopy(polygon_record)
    del no_mask["annotations"][1]["segmentation"]
    _expect_error(no_mask, "annotation 11 of .*image.png has no segmentation")
    wrong_size = copy.deepcopy(polygon_record)
    mask = mask_util.encode(np.ones((4, 5), np.uint8, order="F"))
    wrong_size["annotations"][0]["segmentation"] = mask
    _expect_error(wrong_size, r"annotation 10 .* \(height, width\) \[4, 5\], image \[20, 30\]")
    rle = copy.deepcopy(polygon_record)
    rle["annotations"][0]["segmentation"] = rle["annotations"][2]["segmentation"]
    del rle["annotations"][0]["id"]
    _expect_error(rle, "annotation #0 of .* is an RLE mask; set mask_format", mask_format="polygon")


class UpsideDown(T.Transform):
    """Moves pixels, but no points."""

    def apply_image(self, image):
        return image[::-1]

    def apply_coords(self, coords):
        raise NotImplementedError


def test_masks_and_boxes_follow_augmentations_that_cannot_move_points(polygon_record):
    plain = _mapper(num_classes=2)(polygon_record)
    turned = _mapper(num_classes=2, augmentations=[UpsideDown()])(polygon_record)
    for before, after in (
        (plain["image"], turned["image"]),
        (plain["sem_seg"], turned["sem_seg"]),
        (plain["instances"].gt_masks.tensor, turned["instances"].gt_masks.tensor),
    ):
        assert torch.equal(before.flip(-2), after)
    left, top, right, bottom = plain["instances"].gt_boxes.tensor.unbind(1)
    expected = torch.stack([left, 20 - bottom, right, 20 - top], dim=1)
    assert torch.equal(turned["instances"].gt_boxes.tensor, expected)
    match = r"cannot move polygons; set mask_format \(INPUT.MASK_FORMAT\) bitmask"
    options = {"mask_format": "polygon", "augmentations": [UpsideDown()], "semantic": "none"}
    del polygon_record["annotations"][2:]
    _expect_error(polygon_record, match, **options)


def test_unknown_options_are_rejected():
    with pytest.raises(UserError, match="unknown semantic mode 'yes'"):
        _mapper(semantic="yes")
    with pytest.raises(UserError, match="unknown mask format 'bitmap'"):
        _mapper(mask_format="bitmap")
    with pytest.raises(UserError, match="needs num_classes"):
        _mapper(num_classes=None)
