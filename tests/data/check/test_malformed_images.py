"""Every malformed image or semantic map gives one clear line or correct data: in the mapper, and in
the report of the data check."""

import os
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from d2ext.errors import UserError

GREY = 40
EXIF_TAG = 274


def save(change, name="a.png", **kwargs):
    """Replace the image by `change(image)`."""

    def do(d):
        path = d.images / "a.png"
        image = change(Image.open(path).copy())
        path.unlink()
        d.data["images"][0]["file_name"] = name
        image.save(d.images / name, **kwargs)

    return do


def rename(name):
    return save(lambda image: image, name)


def cut(folder, name="a.png", keep=0.6):
    def do(d):
        path = getattr(d, folder) / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return do


def replace(folder, content):
    def do(d):
        d.use_maps = folder == "maps"
        path = getattr(d, folder) / "a.png"
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return do


def truncated_jpeg(d):
    noise = np.random.default_rng(1).integers(0, 256, (200, 240, 3), np.uint8)
    save(lambda image: Image.fromarray(noise), "a.jpg")(d)
    d.data["images"][0].update(width=240, height=200)
    d.data["annotations"].pop()
    cut("images", "a.jpg")(d)


def text_as_jpeg(d):
    d.data["images"][0]["file_name"] = "a.jpg"
    (d.images / "a.jpg").write_text("<html>404 Not Found</html>")


def folder_as_image(d):
    (d.images / "a.png").unlink()
    (d.images / "a.png").mkdir()


def deep_png(d):
    cv2.imwrite(str(d.images / "a.png"), np.full((10, 12), 1000, np.uint16))


def float_tiff(d):
    save(lambda image: Image.fromarray(np.zeros((10, 12), np.float32)), "a.tiff")(d)


def exif(orientation, change=lambda image: image, name="a.jpg"):
    tags = Image.Exif()
    tags[EXIF_TAG] = orientation
    return save(change, name, exif=tags, **({"quality": 100} if name == "a.jpg" else {}))


def with_map(change):
    def do(d):
        d.use_maps = True
        change(d)

    return do


def write_map(array_or_image):
    def do(d):
        image = array_or_image
        if isinstance(image, np.ndarray):
            cv2.imwrite(str(d.maps / "a.png"), image)
        else:
            image.save(d.maps / "a.png")

    return with_map(do)


def truncated_map(d):
    write_map(np.random.default_rng(0).integers(0, 2, (10, 12), np.uint8))(d)
    cut("maps", keep=0.7)(d)


# name: (change, words of the mapper's error, words of the data check's error)
REFUSED = {
    "truncated PNG": (cut("images"), "cannot read image .*a.png", "cannot be read"),
    "truncated JPEG": (truncated_jpeg, "cannot read image .*a.jpg", "cannot be read"),
    "cut within the header": (cut("images", keep=0.02), "cannot .*a.png", "is no image file"),
    "empty file": (replace("images", b""), "cannot read image .*a.png", "is an empty file"),
    "text file named jpg": (text_as_jpeg, "cannot read image .*a.jpg", "is no image file"),
    "folder": (folder_as_image, "a.png", "is a folder"),
    "16-bit greyscale PNG": (deep_png, "a.png has mode I;16", "more than 8 bits"),
    "TIFF with orientation": (
        lambda d: exif(3, name="a.tiff")(d),
        "a.tiff is a TIFF of orientation 3, which would be turned twice",
        "would be turned twice; save it turned",
    ),
    "TIFF that is turned by a quarter": (
        lambda d: exif(6, lambda image: image.transpose(Image.Transpose.ROTATE_90), "a.tiff")(d),
        "a.tiff is a TIFF of orientation 6",
        "is a TIFF of orientation 6",
    ),
    "float TIFF": (float_tiff, "a.tiff has mode F", "more than 8 bits"),
    "other size": (
        save(lambda image: image.resize((10, 12))),
        r"a.png, got \(10, 12\), expect \(12, 10\)",
        "is 10x12, but 12x10 in the annotations$",
    ),
    "turned by EXIF, annotated as stored": (
        exif(6),
        r"a.jpg, got \(10, 12\), expect \(12, 10\)",
        "its EXIF orientation turns it",
    ),
    "map missing": (replace("maps", None), "map .*a.png does not exist", "which does not exist"),
    "map truncated": (
        truncated_map,
        "semantic map .*semantic/a.png cannot be read",
        "which cannot be read",
    ),
    "map empty": (replace("maps", b""), "semantic/a.png is an empty file", "is an empty file"),
    "map of colours": (write_map(Image.new("RGB", (12, 10))), "has mode RGB", "mode RGB"),
    "map with palette": (write_map(Image.new("P", (12, 10))), "has mode P", "mode P"),
    "map of 16 bits": (write_map(np.zeros((10, 12), np.uint16)), "has mode I;16", "mode I;16"),
    "map of another size": (
        write_map(Image.new("L", (6, 5))),
        "semantic/a.png is 6x5, its image 12x10",
        "which is 6x5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(small_dataset, name):
    change, words, check_words = REFUSED[name]
    change(small_dataset)
    small_dataset.write()
    with pytest.raises(UserError, match=words) as info:
        small_dataset.load()
    assert "\n" not in str(info.value)
    (problem,) = small_dataset.check(thorough=True).of("error")
    assert re.search(check_words, problem.text)


@pytest.mark.parametrize("name", ["truncated PNG", "truncated JPEG", "map truncated"])
def test_truncated_files_are_found_by_their_end(small_dataset, name):
    REFUSED[name][0](small_dataset)
    small_dataset.write()
    (problem,) = small_dataset.check().of("error")
    assert "cannot be read" in problem.text


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_bytes_behind_the_end_of_an_image_are_harmless(small_dataset, name):
    rename(name)(small_dataset)
    with open(small_dataset.images / name, "ab") as f:
        f.write(b"and a trailer")
    small_dataset.write()
    assert not small_dataset.check().problems
    assert small_dataset.load()["image"].shape == (3, 10, 12)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize("bits", [12, 16])
def test_colours_of_12_bits_in_16_are_refused(small_dataset, bits, name):
    values = np.random.default_rng(0).integers(0, 2**bits, (10, 12, 3)).astype(np.uint16)
    rename(name)(small_dataset)
    cv2.imwrite(str(small_dataset.images / name), values)
    small_dataset.write()
    words = "has 16 bits per channel, but values below 4096 only; scale them up"
    found = [(p.severity, p.text) for p in small_dataset.check().problems]
    assert found == ([("error", words)] if bits == 12 else [])


def test_a_missing_first_image_is_noticed_at_registration(small_dataset):
    replace("images", None)(small_dataset)
    small_dataset.write()
    with pytest.raises(UserError, match="image .*a.png, the first of .* does not exist"):
        small_dataset.load()
    (problem,) = small_dataset.check().problems
    assert problem.line() == "image a.png does not exist"


def test_later_images_that_are_missing_are_found_by_the_check(small_dataset):
    for index in range(2, 9):
        small_dataset.data["images"].append(
            {"id": 10 + index, "file_name": f"{index}.png", "width": 5, "height": 5}
        )
    small_dataset.write()
    report = small_dataset.check()
    assert [p.image for p in report.of("error")] == [f"{i}.png" for i in range(2, 9)]
    table = report.table()
    assert "6.png" in table and "7.png" not in table and "... and 2 more like these" in table


def test_labels_beyond_the_model_are_refused(small_dataset):
    write_map(np.full((10, 12), 9, np.uint8))(small_dataset)
    small_dataset.write()
    with pytest.raises(UserError, match=r"go up to 9, but the model has 3 labels \(0..2"):
        small_dataset.load(num_semantic_labels=3)


def to_cmyk(image):
    return Image.merge("CMYK", [Image.new("L", image.size, v) for v in (255, 0, 0, 0)])


def rgb16(d):
    """Red falls from 255 to 0 in the high byte; the low byte is noise."""
    high = np.linspace(255, 0, 120).astype(np.uint16).reshape(10, 12)
    low = np.random.default_rng(0).integers(0, 256, (10, 12)).astype(np.uint16)
    image = np.zeros((10, 12, 3), np.uint16)
    image[:, :, 2] = high * 256 + low
    cv2.imwrite(str(d.images / "a.png"), image)


def stored(d):
    return d.pixels


def grey(d):
    value = np.asarray(Image.fromarray(d.pixels).convert("L"))
    return np.repeat(value[:, :, None], 3, axis=2)


def constant(*rgb):
    return lambda d: np.broadcast_to(np.array(rgb, np.uint8), (10, 12, 3))


def red_ramp(d):
    image = np.zeros((10, 12, 3), np.uint8)
    image[:, :, 0] = np.linspace(255, 0, 120).astype(np.uint8).reshape(10, 12)
    return image


# name: (change, expected RGB pixels, kind of the warning)
ACCEPTED = {
    "palette PNG": (save(lambda i: i.quantize(256)), stored, None),
    "transparent PNG": (
        save(lambda i: Image.merge("RGBA", [*i.split(), Image.new("L", i.size, GREY)])),
        stored,
        "image-alpha",
    ),
    "greyscale PNG": (save(lambda i: i.convert("L")), grey, None),
    "greyscale PNG with transparency": (save(lambda i: i.convert("LA")), grey, "image-alpha"),
    "bilevel PNG": (save(lambda i: Image.new("1", i.size, 1)), constant(255, 255, 255), None),
    "CMYK JPEG": (save(to_cmyk, "a.jpg", quality=100), constant(0, 255, 255), None),
    "16-bit colour PNG": (rgb16, red_ramp, None),
    "BMP": (rename("a.bmp"), stored, None),
    "lossless WebP": (save(lambda i: i, "a.webp", lossless=True), stored, None),
    "name with other letters": (rename("фото ü 1.png"), stored, None),
    "name without extension": (save(lambda i: i, "a", format="PNG"), stored, None),
}


def assert_image(d, expected):
    out = d.load()
    image = out["image"].numpy().transpose(1, 2, 0)
    assert np.abs(image.astype(int) - expected(d)).max() <= 3
    assert out["instances"].gt_classes.tolist() == [0, 1]


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_gives_correct_pixels(small_dataset, name):
    change, expected, kind = ACCEPTED[name]
    change(small_dataset)
    small_dataset.write()
    assert_image(small_dataset, expected)
    report = small_dataset.check(thorough=True)
    assert [p.kind for p in report.problems] == ([kind] if kind else [])


def test_absolute_names_and_names_through_other_folders_are_followed(small_dataset):
    os.rename(small_dataset.images / "a.png", small_dataset.folder / "b.png")
    for name in (str(small_dataset.folder / "b.png"), "../b.png"):
        small_dataset.data["images"][0]["file_name"] = name
        small_dataset.write()
        assert not small_dataset.check().problems
    assert_image(small_dataset, stored)


def test_image_turned_by_exif_fits_annotations_of_the_picture_shown(small_dataset):
    def black_and_white(image):
        shown = np.zeros((10, 12), np.uint8)
        shown[:5] = 255
        return Image.fromarray(np.rot90(shown).copy())  # turned back by 90 degrees

    exif(6, black_and_white)(small_dataset)
    small_dataset.write()
    image = small_dataset.load()["image"]
    assert image.shape == (3, 10, 12) and (image[:, :4] > 200).all() and (image[:, 6:] < 50).all()
    (problem,) = small_dataset.check().problems
    assert (problem.severity, problem.kind) == ("warning", "image-orientation")


def test_an_unlabelled_pixel_stays_255(small_dataset):
    labels = np.ones((10, 12), np.uint8)
    labels[:3] = 255
    labels[3] = 0
    write_map(labels)(small_dataset)
    small_dataset.write()
    out = small_dataset.load(num_semantic_labels=2)
    np.testing.assert_array_equal(out["sem_seg"].numpy(), labels)
