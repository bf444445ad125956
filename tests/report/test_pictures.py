"""Thumbnails and outlines: what they show, and that a page stays small."""

import base64
import io
import json
import re

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2ext.errors import UserError
from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.report import write_report
from d2ext.report.pictures import GRID, build_gallery, outline
from d2ext.visualization.overlay import instance_colors

from tests.report.helpers import make_entry


def filled(text, size, scale):
    """The mask that an outline stands for, by OpenCV's even-odd rule."""
    canvas = np.zeros((round(size[0] * scale), round(size[1] * scale)), np.uint8)
    rings = [np.fromstring(ring, int, sep=" ") for ring in text.split(";") if ring]
    cv2.fillPoly(canvas, [np.cumsum(ring.reshape(-1, 2), axis=0) for ring in rings], 1)
    return canvas


@pytest.mark.parametrize("size", [(100, 128), (1500, 1100)])
def test_outlines_are_the_masks_with_their_holes(size):
    mask = np.zeros(size, np.uint8)
    height, width = size
    cv2.ellipse(mask, (width // 2, height // 2), (width // 3, height // 4), 20, 0, 360, 1, -1)
    cv2.circle(mask, (width // 2, height // 2), height // 10, 0, -1)
    mask[:7, -20:] = 1  # a second part, at the edge
    scale = GRID / max(size)
    text = outline(mask_util.encode(np.asfortranarray(mask)), scale)
    drawn = filled(text, size, scale)
    wanted = cv2.resize(mask, drawn.shape[::-1], interpolation=cv2.INTER_NEAREST)
    assert (drawn & wanted).sum() / (drawn | wanted).sum() > 0.96
    assert text.count(";") == 2 and len(text) < 700


def test_a_mask_of_a_pixel_has_an_outline_and_an_empty_one_none():
    mask = np.zeros((900, 900), np.uint8, order="F")
    assert outline(mask_util.encode(mask), GRID / 900) == ""
    mask[400, 500] = 1
    ring = np.fromstring(outline(mask_util.encode(mask), GRID / 900), int, sep=" ")
    assert ring[:2] == pytest.approx(np.array([500, 400]) * GRID / 900, abs=2)


def make_set(folder, count, size, objects, rng):
    """Truth and records of generated images that a JPEG makes large."""
    height, width = size
    images, records = [], []
    folder.mkdir(exist_ok=True)
    for number in range(count):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        path = folder / f"{number:04d}.png"
        cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        annotations = []
        for _ in range(objects):
            mask = np.zeros(size, np.uint8)
            center = int(rng.integers(width)), int(rng.integers(height))
            axes = tuple(int(v) for v in rng.integers(10, width // 5, 2))
            cv2.ellipse(mask, center, axes, float(rng.integers(180)), 0, 360, 1, -1)
            rle = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {"bbox": mask_util.toBbox(rle).tolist(), "segmentation": rle, "iscrowd": 0,
                 "area": float(mask_util.area(rle)), "label": int(rng.integers(3))}
            )  # fmt: skip
        images.append(TruthImage(number, size, annotations))
        records.append({"file_name": str(path), "image_id": number})
    return records, GroundTruth(images, ["a", "b", "c"], [1, 2, 3])


@pytest.mark.slow
def test_a_page_of_500_images_is_below_15_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    records, truth = make_set(tmp_path / "images", 500, (240, 320), 8, rng)
    entries = [make_entry(name, truth, n, lost=0.1) for n, name in enumerate("abc")]
    path = tmp_path / "report.html"
    write_report(path, entries, truth, records, "many")
    assert path.stat().st_size < 15_000_000
    page = path.read_text(encoding="utf-8")
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1]
    data = json.loads(data)
    assert len(data["images"]) == 500 and data["models"] == ["a", "b", "c"]
    spread = [image["spread"] for image in data["images"]]
    assert spread == sorted(spread, reverse=True) and spread[0] > 0
    # In the limits, thumbnails and outlines are as good as they can be.
    assert path.stat().st_size > 6_000_000


def test_low_scores_and_then_images_are_left_out_where_outlines_are_too_many(tmp_path, monkeypatch):
    from d2ext.report import pictures

    records, truth = make_set(tmp_path / "x", 6, (60, 80), 5, np.random.default_rng(1))
    entries = [make_entry("a", truth, lost=0), make_entry("b", truth, 1, lost=0)]
    quality = np.linspace(0, 1, 12).reshape(2, 6)
    whole = build_gallery(entries, truth, records, quality)
    assert (whole.lowest, whole.left_out) == (pictures.LOWEST_SCORES[0], 0)
    objects = [len(own) for image in whole.data["images"] for own in image["found"]]
    size = sum(pictures._outline_size(image) for image in whole.data["images"])
    monkeypatch.setattr(pictures, "OUTLINE_BYTES", int(0.8 * size))
    part = build_gallery(entries, truth, records, quality)
    assert part.lowest > 0.3 and part.left_out == 0
    found = [own for image in part.data["images"] for own in image["found"]]
    assert all(x[1] >= 1000 * part.lowest for own in found for x in own)
    assert 0 < sum(map(len, found)) < sum(objects)
    monkeypatch.setattr(pictures, "OUTLINE_BYTES", int(0.2 * size))
    few = build_gallery(entries, truth, records, quality)
    assert 0 < few.left_out < 6 and len(few.data["images"]) == 6 - few.left_out


def test_thumbnails_get_smaller_until_they_fit(tmp_path, monkeypatch):
    from d2ext.report import pictures

    records, truth = make_set(tmp_path / "x", 4, (600, 800), 1, np.random.default_rng(2))
    quality = np.zeros((1, 4))
    entry = make_entry("a", truth)
    large = build_gallery([entry], truth, records, quality)
    monkeypatch.setattr(pictures, "THUMBNAIL_BYTES", 40_000)
    small = build_gallery([entry], truth, records, quality)
    assert large.side > small.side
    for gallery, limit in ((large, 8_000_000), (small, 40_000)):
        uris = [image["thumbnail"] for image in gallery.data["images"]]
        assert sum(map(len, uris)) <= limit
        shown = Image.open(io.BytesIO(base64.b64decode(uris[0].partition(",")[2])))
        assert max(shown.size) == min(gallery.side, 800)


def test_most_different_images_come_first_and_the_worst_of_a_single_model(tmp_path):
    records, truth = make_set(tmp_path / "x", 3, (60, 80), 2, np.random.default_rng(3))
    entries = [make_entry("a", truth), make_entry("b", truth, 1)]
    quality = np.array([[0.5, 0.9, np.nan], [0.6, 0.1, np.nan]])
    names = [x["place"] for x in build_gallery(entries, truth, records, quality).data["images"]]
    assert names == [1, 0, 2]
    single = build_gallery(entries[:1], truth, records, quality[:1], most=2)
    assert [x["place"] for x in single.data["images"]] == [0, 1] and single.left_out == 1
    assert single.data["images"][0]["quality"] == [0.5]


def test_classes_have_the_colours_of_the_data_set(tmp_path):
    records, truth = make_set(tmp_path / "x", 1, (60, 80), 1, np.random.default_rng(4))
    own = [(255, 0, 0), (0, 255, 0), (10, 10, 10)]
    gallery = build_gallery([make_entry("a", truth)], truth, records, np.zeros((1, 1)), 1, own)
    for label, shades in enumerate(gallery.data["shades"]):
        assert shades == [
            "#" + "".join(f"{round(255 * v):02x}" for v in color)
            for color in instance_colors([label] * 4, own)
        ]


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    records, truth = make_set(tmp_path / "x", 1, (60, 80), 1, np.random.default_rng(5))
    (tmp_path / "x/0000.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read image .*0000.png"):
        build_gallery([make_entry("a", truth)], truth, records, np.zeros((1, 1)))
