"""Large-scale jitter, rotation and colours: what becomes of images, masks, boxes and labels."""

import copy
import itertools

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from d2ext.config import get_cfg
from d2ext.data import ColorJitter, InstanceSegMapper, LargeScaleJitter, get_dataset_records
from d2ext.engine import build_experiment
from d2ext.engine.twins import assert_same
from d2ext.errors import UserError

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, PolygonMasks

WIDTH, HEIGHT = 40, 30


def rle(mask):
    return mask_util.encode(np.asfortranarray(mask, np.uint8))


def annotation(mask_or_polygon, category=0):
    found = {"bbox": [0, 0, WIDTH, HEIGHT], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    polygon = isinstance(mask_or_polygon, list)
    found["segmentation"] = [mask_or_polygon] if polygon else rle(mask_or_polygon)
    return {**found, "category_id": category}


@pytest.fixture
def record(tmp_path):
    """An image whose colours are the number of its rows and columns, with a random mask."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([5 * rows, 5 * columns, np.full_like(rows, 255)], axis=2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3
    return {
        "file_name": str(tmp_path / "image.png"),
        "image_id": 0,
        "width": WIDTH,
        "height": HEIGHT,
        "annotations": [annotation(mask, 1)],
    }


def map_record(record, augmentations, seed=0, **options):
    options = {"num_classes": 3, "image_format": "RGB", **options}
    mapper = InstanceSegMapper(True, augmentations=augmentations, **options)
    return mapper({**record, "sample_seed": seed})


def check_tight(instances):
    for box, mask in zip(instances.gt_boxes.tensor.tolist(), instances.gt_masks.tensor.numpy()):
        y, x = np.nonzero(mask)
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("size", [(30, 40), (20, 25), (64, 80), (100, 16)])
def test_jitter_without_scaling_shows_a_window_of_the_image_and_grey_outside(record, size):
    """Of the image's own size, smaller, larger, and both."""
    ratio = min(size[0] / HEIGHT, size[1] / WIDTH)
    jitter = LargeScaleJitter(size, 1 / ratio, 1 / ratio)
    image = np.asarray(Image.open(record["file_name"]))
    mask = mask_util.decode(record["annotations"][0]["segmentation"])
    height, width = min(size[0], HEIGHT), min(size[1], WIDTH)
    corners = set()
    for seed in range(12):
        out = map_record(record, [jitter], seed, semantic="instances")
        pixels = out["image"].numpy().transpose(1, 2, 0)
        assert pixels.shape == (*size, 3)
        y, x = (int(v) // 5 for v in pixels[0, 0, :2])
        corners.add((y, x))
        window = np.s_[y : y + height, x : x + width]
        np.testing.assert_array_equal(pixels[:height, :width], image[window])
        assert (pixels[height:] == 128).all() and (pixels[:, width:] == 128).all()
        expected = np.zeros(size, bool)
        expected[:height, :width] = mask[window]
        np.testing.assert_array_equal(out["instances"].gt_masks.tensor[0].numpy(), expected)
        check_tight(out["instances"])
        labels = np.full(size, 255)
        labels[:height, :width] = np.where(mask[window], 1, 3)
        np.testing.assert_array_equal(out["sem_seg"].numpy(), labels)
    assert (len(corners) > 4) == (HEIGHT > size[0] or WIDTH > size[1])


def test_crops_are_drawn_independently_on_both_axes(record):
    corners = []
    for seed in range(30):
        out = map_record(record, [LargeScaleJitter((15, 20), 2.0, 2.0)], seed)
        corners.append(out["image"][:2, 0, 0].tolist())
    y, x = np.array(corners, float).T
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.6 and len(set(map(tuple, corners))) > 20


def test_scales_of_the_jitter_cover_their_range():
    jitter = LargeScaleJitter(100, 0.1, 2.0)
    scales = []
    for _ in range(300):
        resize = jitter.get_transform(np.zeros((50, 200, 3), np.uint8)).transforms[0]
        assert abs(resize.new_w - 4 * resize.new_h) <= 2
        scales.append(resize.new_w / 100)
    assert 0.09 < min(scales) < 0.2 and 1.85 < max(scales) <= 2.0
    assert abs(np.mean(scales) - 1.05) < 0.1


def test_an_image_is_never_scaled_to_nothing():
    jitter = LargeScaleJitter(16, 0.1, 0.1)
    image = np.zeros((1, 400, 3), np.uint8)
    assert jitter.get_transform(image).apply_image(image).shape == (16, 16, 3)


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_polygons_are_cut_like_their_bitmaps(record, mask_format):
    """A bow tie, whose two halves wind in opposite directions, and a ring with a bridge."""
    bow = [4.3, 4.1, 16.9, 14.4, 16.9, 4.1, 4.3, 14.4]
    ring = [20, 4, 36, 4, 36, 26, 20, 26, 20, 4, 24, 8, 24, 22, 32, 22, 32, 8, 24, 8]
    corner = [0, 29, 0, 30, 1, 30]
    shapes = [bow, ring, corner]
    record = {**record, "annotations": [annotation(s, i) for i, s in enumerate(shapes)]}
    whole = [mask_util.decode(mask_util.merge(mask_util.frPyObjects([s], 30, 40))) for s in shapes]
    seen = set()
    for seed in range(20):
        jitter = LargeScaleJitter((20, 30), 1.5, 1.5)  # the image in its own size
        out = map_record(record, [jitter], seed, mask_format=mask_format, semantic="instances")
        y, x = (int(v) // 5 for v in out["image"][:2, 0, 0])
        parts = [mask[y : y + 20, x : x + 30].astype(bool) for mask in whole]
        classes = [i for i, part in enumerate(parts) if part.any()]
        instances = out["instances"]
        assert instances.gt_classes.tolist() == classes
        seen.update(classes)
        if isinstance(instances.gt_masks, PolygonMasks):
            assert mask_format == "polygon"
            instances.gt_masks = instances.gt_masks.crop_and_resize(
                torch.tensor([[0.0, 0.0, 20.0, 20.0]] * len(classes)), 20
            )
            parts = [part[:, :20] for part in parts]
            found = instances.gt_masks.numpy()
        else:
            found = instances.gt_masks.tensor.numpy()
            check_tight(instances)
        for i, mask in zip(classes, found):
            # COCO's rounding goes another way at slanted edges with a corner outside.
            assert (mask != parts[i]).sum() <= 6
    assert {0, 1} <= seen


def test_boxes_of_cut_polygons_are_those_of_their_bitmaps(record):
    triangle = [0, 0, 40, 0, 0, 30]
    record = {**record, "annotations": [annotation(triangle)]}
    for seed in range(10):
        jitter = LargeScaleJitter((12, 12), 4.0, 4.0)
        outs = [
            map_record(record, [jitter], seed, mask_format=x, semantic="none")["instances"]
            for x in ("polygon", "bitmask")
        ]
        assert torch.equal(*(x.gt_boxes.tensor for x in outs))


def test_objects_of_few_pixels_are_left_out(record):
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    masks[0, 2:4, 2:4], masks[1, 10:13, 10:13], masks[2, 20:21, 0:3] = True, True, True
    record = {**record, "annotations": [annotation(m, i) for i, m in enumerate(masks)]}
    for least, classes in ((0, [0, 1, 2]), (4, [0, 1]), (5, [1]), (10, [])):
        out = map_record(record, [], min_area=least, semantic="none")
        assert out["instances"].gt_classes.tolist() == classes
        assert out["instances"].has("gt_masks") and len(out["instances"].gt_boxes) == len(classes)


@pytest.mark.parametrize("size", [(30, 40), (1, 7), (13, 13)])
def test_rotation_is_that_of_numpy(tmp_path, size):
    height, width = size
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (*size, 3)).astype(np.uint8)
    mask = draw.random(size) < 0.5
    mask[0, 0] = True
    labels = draw.integers(0, 4, size).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    box = [0.25 * width, 0, 0.75 * width, 0.5 * height]
    polygon = [box[0], box[1], box[2], box[1], box[2], box[3]]
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": height,
        "width": width,
        "annotations": [annotation(mask)],
    }
    cfg = get_cfg()
    cfg.INPUT.ROTATE_90, cfg.INPUT.RANDOM_FLIP = True, "none"
    (rotation, _) = InstanceSegMapper(cfg, True).augmentations.augs
    turned = set()
    for seed in range(16):
        out = map_record(record, [rotation], seed, semantic="dataset")
        found = out["image"].numpy().transpose(1, 2, 0)
        (k,) = [k for k in range(4) if np.array_equal(found, np.rot90(image, k))]
        turned.add(k)
        instances = out["instances"]
        np.testing.assert_array_equal(instances.gt_masks.tensor[0].numpy(), np.rot90(mask, k))
        np.testing.assert_array_equal(out["sem_seg"].numpy(), np.rot90(labels, k))
        check_tight(instances)
        transform = T.RotationTransform(height, width, 90 * k)
        (corners,) = transform.apply_polygons([np.reshape(polygon, (-1, 2)).astype(float)])
        x, y = np.reshape(polygon, (-1, 2)).T
        expected = [(x, y), (y, width - x), (width - x, height - y), (height - y, x)][k]
        np.testing.assert_allclose(corners, np.stack(expected, 1), atol=1e-9)
    assert turned == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "name, adjust",
    [
        ("brightness", F.adjust_brightness),
        ("contrast", F.adjust_contrast),
        ("saturation", F.adjust_saturation),
        ("hue", F.adjust_hue),
    ],
)
def test_colour_jitter_is_torchvisions_of_a_factor_in_range(name, adjust):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    factors = np.linspace(-0.3, 0.3, 61) + (name != "hue")
    jitter = ColorJitter(**{name: 0.3}, image_format="RGB")
    distances, pictures = [], set()
    for _ in range(10):
        out = jitter.get_transform(image).apply_image(image)
        assert out.dtype == np.uint8 and out.shape == image.shape
        pictures.add(out.tobytes())
        tensor = torch.from_numpy(image.transpose(2, 0, 1))
        near = [adjust(tensor, f).numpy().transpose(1, 2, 0).astype(int) for f in factors]
        distances.append(min(np.abs(out - x).mean() for x in near))
    assert len(pictures) == 10 and max(distances) < 2


def test_colours_of_bgr_images_change_like_those_of_rgb_images():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    outs = []
    for order, pixels in (("RGB", image), ("BGR", image[:, :, ::-1])):
        torch.manual_seed(3)
        transform = ColorJitter(0.4, 0.4, 0.4, 0.2, order).get_transform(pixels)
        outs.append(transform.apply_image(pixels))
        assert np.array_equal(transform.apply_image(pixels), outs[-1])
        assert transform.apply_segmentation(pixels) is pixels
    np.testing.assert_array_equal(outs[0], outs[1][:, :, ::-1])
    assert not np.array_equal(outs[0], image)


def test_sample_seed_decides_everything(record):
    augmentations = [
        T.RandomRotation([0, 90, 180, 270], sample_style="choice"),
        LargeScaleJitter(32),
        ColorJitter(0.4, 0.4, 0.4, 0.1, "RGB"),
    ]
    first, other, again = (map_record(record, augmentations, seed) for seed in (5, 6, 5))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["sem_seg"], again["sem_seg"])
    assert not torch.equal(first["image"], other["image"])


def test_no_key_changes_what_detectron2_does():
    cfg = get_cfg()
    plain = InstanceSegMapper(cfg, True).augmentations.augs
    assert [type(a) for a in plain] == [T.ResizeShortestEdge, T.RandomFlip]
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.ROTATE_90, cfg.INPUT.COLOR_JITTER.HUE = True, True, 0.1
    assert [type(a) for a in InstanceSegMapper(cfg, False).augmentations.augs] == [type(plain[0])]


_YAML = [
    "INPUT.LSJ.ENABLED=True", "INPUT.LSJ.SIZE=[96,128]", "INPUT.LSJ.MIN_SCALE=0.5",
    "INPUT.LSJ.MAX_SCALE=1.5", "INPUT.COLOR_JITTER.BRIGHTNESS=0.4", "INPUT.ROTATE_90=True",
    "INPUT.COLOR_JITTER.CONTRAST=0.3", "INPUT.COLOR_JITTER.SATURATION=0.2",
    "INPUT.COLOR_JITTER.HUE=0.1",
]  # fmt: skip
_SAME = [
    "INPUT.COPY_PASTE.PROB=0.6", "INPUT.COPY_PASTE.MAX_OBJECTS=3", "INPUT.MIN_MASK_AREA=9",
    "INPUT.COPY_PASTE.MIN_VISIBLE=0.2", "SOLVER.IMS_PER_BATCH=2", "DATASETS.TEST=shapes_few",
    "DATASETS.TRAIN=shapes_few", "MODEL.DEVICE=cpu",
]  # fmt: skip


def augmented_experiments(configs="configs/mask_rcnn_tiny"):
    yaml = build_experiment(f"{configs}.yaml", [*_YAML, *_SAME])
    lazy = build_experiment(f"{configs}.py", _SAME)
    mapper = lazy.cfg.dataloader.train.mapper
    mapper.augmentations = [
        L(T.RandomRotation)(angle=[0, 90, 180, 270], sample_style="choice"),
        L(LargeScaleJitter)(size=[96, 128], min_scale=0.5, max_scale=1.5),
        L(T.RandomFlip)(horizontal=True),
        L(ColorJitter)(
            brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, image_format="BGR"
        ),
    ]  # fmt: skip
    return yaml, lazy


def test_yaml_and_lazy_config_give_the_same_images(shapes_few):
    experiments = augmented_experiments()
    loaders = [e.build_train_loader() for e in experiments]
    assert_same(*loaders)
    batches = [list(itertools.islice(loader, 4)) for loader in loaders]
    for first, second in zip(*(itertools.chain(*b) for b in batches)):
        assert first["image"].shape == (3, 96, 128)
        assert torch.equal(first["image"], second["image"])
        masks = [x["instances"].gt_masks.tensor for x in (first, second)]
        assert torch.equal(*masks) and (masks[0].flatten(1).sum(1) >= 9).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_resuming_do_not_change_the_images(shapes_few, num_workers):
    yaml, _ = augmented_experiments()
    whole = list(itertools.islice(yaml.build_train_loader(), 6))
    yaml.cfg.DATALOADER.NUM_WORKERS = num_workers
    rest = list(itertools.islice(yaml.build_train_loader(start_iter=3), 3))
    for first, second in zip(itertools.chain(*whole[3:]), itertools.chain(*rest)):
        assert first["sample_seed"] == second["sample_seed"]
        assert torch.equal(first["image"], second["image"])
        first, second = first["instances"], second["instances"]
        assert torch.equal(first.gt_masks.tensor, second.gt_masks.tensor)
        assert torch.equal(first.gt_boxes.tensor, second.gt_boxes.tensor)


def test_other_samples_stay_when_copy_paste_is_on(shapes_few):
    """It draws its numbers apart from those of the images into which it pastes."""
    options = ["DATASETS.TRAIN=shapes_few", "DATASETS.TEST=shapes_few", "MODEL.DEVICE=cpu"]
    batches = []
    for prob in (0.0, 0.5):
        paste = f"INPUT.COPY_PASTE.PROB={prob}"
        loader = build_experiment(
            "configs/mask_rcnn_tiny.py", [*options, paste]
        ).build_train_loader()
        batches.append(list(itertools.chain(*itertools.islice(loader, 5))))
    same = [torch.equal(a["image"], b["image"]) for a, b in zip(*batches)]
    assert [a["sample_seed"] for a in batches[0]] == [b["sample_seed"] for b in batches[1]]
    assert 4 <= sum(same) <= 16


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: LargeScaleJitter(0), "INPUT.LSJ.SIZE. is .0.; give one or two numbers"),
        (lambda: LargeScaleJitter([4, 4, 4]), "is .4, 4, 4."),
        (lambda: LargeScaleJitter([]), r"is \[\]"),
        (lambda: LargeScaleJitter(8, 0.0, 1.0), "are 0.0 and 1.0; they have to be above 0"),
        (lambda: LargeScaleJitter(8, 2.0, 1.0), "the first the smaller one"),
        (lambda: ColorJitter(hue=0.7), "INPUT.COLOR_JITTER.: hue"),
        (lambda: ColorJitter(brightness=-1.0), "brightness"),
        (lambda: ColorJitter(image_format="YUV"), "not 'YUV'"),
        (lambda: map_record({}, [], min_area=-1), "INPUT.MIN_MASK_AREA. is -1"),
    ],
)
def test_settings_out_of_range_are_named(build, match):
    with pytest.raises(UserError, match=match) as info:
        build()
    assert "\n" not in str(info.value)


def test_padding_with_the_ignored_label_is_no_part_of_objects(record):
    """As by FixedSizeCrop of detectron2's main branch."""
    padding = T.PadTransform(0, 0, 10, 20, WIDTH, HEIGHT, 128.0, 255)
    out = map_record(record, [padding], semantic="instances")
    masks, labels = out["instances"].gt_masks.tensor[0], out["sem_seg"]
    expected = mask_util.decode(record["annotations"][0]["segmentation"])
    np.testing.assert_array_equal(masks[:HEIGHT, :WIDTH].numpy(), expected)
    assert not masks[HEIGHT:].any() and not masks[:, WIDTH:].any()
    assert (labels[HEIGHT:] == 255).all() and (labels[:HEIGHT, :WIDTH] != 255).all()


def test_records_are_not_modified(shapes_few):
    record = get_dataset_records(shapes_few)[0]
    before = copy.deepcopy(record)
    map_record(record, [LargeScaleJitter(64)], num_classes=8)
    assert record == before
