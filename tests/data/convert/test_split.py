"""Splits by image: shares of every class, groups that stay together, pictures that are the same."""

import cv2
import numpy as np
import pytest
from PIL import Image

from d2ext.data.convert.duplicates import duplicate_groups
from d2ext.data.convert.split import split_coco
from d2ext.errors import UserError

from tests.data.convert.helpers import photo

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def coco(labels):
    """A file whose images show the given sets of classes, 1 to 4."""
    images = [{"id": 7 * i, "file_name": f"{i}.png"} for i in range(len(labels))]
    pairs = [(7 * i, c) for i, classes in enumerate(labels) for c in classes]
    annotations = [{"id": i, "image_id": n, "category_id": c} for i, (n, c) in enumerate(pairs)]
    categories = [{"id": c, "name": "abcd"[c - 1]} for c in (1, 2, 3, 4)]
    return {"images": images, "annotations": annotations, "categories": categories}


def labels(count, seed=0):
    """Classes of very different frequencies, several in an image or none."""
    rng = np.random.default_rng(seed)
    return [
        [c for c, p in zip((1, 2, 3, 4), (0.7, 0.4, 0.2, 0.05)) if rng.random() < p]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_every_part_has_its_share_of_every_class(seed):
    data = coco(labels(400, seed))
    parts, notes = split_coco(data, np.arange(400), SHARES, seed)
    assert notes == []
    names = [i["file_name"] for part in parts.values() for i in part["images"]]
    assert sorted(names) == sorted(i["file_name"] for i in data["images"])
    for name, share in SHARES.items():
        assert abs(len(parts[name]["images"]) - share * 400) <= 8
        assert parts[name]["categories"] == data["categories"]
        for c in (1, 2, 3, 4):
            of = [sum(a["category_id"] == c for a in d["annotations"]) for d in (parts[name], data)]
            assert abs(of[0] - share * of[1]) <= 2


def test_a_seed_gives_one_split_and_another_seed_another():
    data = coco(labels(60))
    first, again, other = (split_coco(data, np.arange(60), SHARES, s)[0] for s in (1, 1, 2))
    assert first == again and first != other


def test_groups_are_not_divided():
    groups = np.repeat(np.arange(20), 3)
    parts, notes = split_coco(coco(labels(60)), groups, SHARES)
    found = [{i["id"] // 21 for i in part["images"]} for part in parts.values()]
    assert sum(map(len, found)) == 20 and set.union(*found) == set(range(20))
    assert notes[-1:] == ["40 images show the same as others and are in the same part as those"]


def test_parts_without_a_class_are_told_and_empty_parts_refused():
    parts, notes = split_coco(coco([[1], [1], [1, 4]]), np.arange(3), SHARES)
    assert [len(part["images"]) for part in parts.values()] == [1, 1, 1]
    assert sum("d" in note.partition(" of ")[2] for note in notes) == 2
    with pytest.raises(UserError, match="3 images in 2 groups .* leave none for"):
        split_coco(coco([[1], [1], [1]]), np.array([0, 0, 1]), SHARES)
    parts, _ = split_coco(coco([[1], [1]]), np.arange(2), {"train": 0.5, "val": 0.5, "test": 0.0})
    assert list(parts) == ["train", "val"]


def test_copies_and_pictures_saved_again_are_found(tmp_path):
    image = photo(0, (120, 90))
    smaller = cv2.resize(image, (60, 45), interpolation=cv2.INTER_AREA)
    exif = Image.Exif()
    exif[274] = 6
    files = {
        "a.png": image,
        "copy.bmp": image,
        "jpeg.jpg": image,
        "smaller.png": smaller,
        "brighter.png": np.minimum(image, 235) + 20,
        "turned.png": np.rot90(image),  # shown as the others
        "flipped.png": image[:, ::-1],
        **{f"other{i}.png": photo(i, (120, 90)) for i in range(1, 20)},
    }
    for name, pixels in files.items():
        options = {"exif": exif} if name == "turned.png" else {}
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name, **options)
    groups = duplicate_groups([str(tmp_path / name) for name in files])
    assert groups.tolist() == [0] * 6 + list(range(1, 21))


def test_pictures_on_one_plain_ground_are_told_apart(tmp_path):
    paths = []
    for i in range(6):
        pixels = np.full((90, 120, 3), 200, np.uint8)
        cv2.circle(pixels, (20 + 15 * i, 30 + 6 * i), 18, (30, 60 * (i % 3), 90), -1)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    assert duplicate_groups(paths).tolist() == list(range(6))
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError, match="broken.png cannot be read"):
        duplicate_groups([str(tmp_path / "broken.png")])
