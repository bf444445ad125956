"""An image is the same in whatever form it is given, and what cannot be read is one line."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from d2ext.errors import UserError
from d2ext.inference import ImageRecord, read_bgr


def test_exif_orientation_is_respected(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15, 0] = 200  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    for given in (str(tmp_path / "turned.png"), (tmp_path / "turned.png").read_bytes()):
        bgr = read_bgr(given)
        assert bgr.shape == (30, 20, 3)
        assert (bgr[:15, :, 2] == 200).all() and (bgr[15:] == 0).all()


def test_grey_and_transparent_images_become_three_channels(tmp_path):
    Image.new("L", (8, 6), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 6), (1, 2, 3, 4)).save(tmp_path / "clear.png")
    assert (read_bgr(str(tmp_path / "grey.png")) == 7).all()
    assert (read_bgr(str(tmp_path / "clear.png")) == (3, 2, 1)).all()


def test_all_forms_of_an_image_are_one(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    forms = [tmp_path / "a.png", content, Image.open(io.BytesIO(content)), tensor]
    for form in [*forms, np.ascontiguousarray(rgb[:, :, ::-1])]:
        np.testing.assert_array_equal(read_bgr(form), rgb[:, :, ::-1])


def test_a_part_of_a_file_is_an_image(tmp_path):
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "many.bin").write_bytes(b"before" + content + b"after")
    record = ImageRecord(1, "a", str(tmp_path / "many.bin"), (6, len(content)))
    assert (record.read() == (3, 2, 1)).all()
    with pytest.raises(UserError, match="many.bin ends too early"):
        ImageRecord(1, "a", str(tmp_path / "many.bin"), (6, 9999)).read()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_what_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"image '.*a\.png' cannot be read"):
        read_bgr(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="image 'clip' cannot be read"):
        ImageRecord(1, "clip", pixels=content).read()


def test_tensors_of_another_form_are_refused():
    with pytest.raises(UserError, match=r"not \(9, 9, 3\) of uint8"):
        read_bgr(torch.zeros(9, 9, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"not \(3, 9, 9\) of float32"):
        read_bgr(torch.zeros(3, 9, 9))
