"""What words of a command line stand for."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image

from d2ext.errors import UserError
from d2ext.inference import find_images, open_source
from d2ext.inference.sources import expand_inputs


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def places(source):
    return [record.place for record in source.records]


def test_files_folders_and_patterns_stand_for_images_in_order(tmp_path):
    touch(tmp_path, "b.png", "d/2.JPG", "d/1.jpg", "d/notes.txt", "e/x.jpg", "e/y.jpg")
    inputs = [str(tmp_path / x) for x in ("b.png", "d", "e/*.jpg", "b.png")]
    expected = [str(tmp_path / x) for x in ("b.png", "d/1.jpg", "d/2.JPG", "e/x.jpg", "e/y.jpg")]
    assert expand_inputs(inputs) == expected
    source = find_images(inputs)
    assert places(source) == expected and source.total == 5
    assert [r.image_id for r in source.records] == [1, 2, 3, 4, 5]


def test_file_whose_name_looks_like_a_pattern_is_taken_literally(tmp_path):
    touch(tmp_path, "a[1].png")
    assert expand_inputs([str(tmp_path / "a[1].png")]) == [str(tmp_path / "a[1].png")]


@pytest.mark.parametrize("name", ["absent.jpg", "*.jpg", "."])
def test_input_that_stands_for_nothing_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match="--input .*(no such image|no images)"):
        expand_inputs([str(tmp_path / name)])


def test_a_list_has_paths_seen_from_it_and_addresses(tmp_path):
    touch(tmp_path, "x/a.png")
    lines = ["a.png", "", f"  {tmp_path}/b.png ", "s3://bucket/c.png"]
    (tmp_path / "x/list.txt").write_text("\n".join(lines))
    expected = [f"{tmp_path}/x/a.png", f"{tmp_path}/b.png", "s3://bucket/c.png"]
    assert places(find_images([str(tmp_path / "x/list.txt")])) == expected
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="empty.txt: the list is empty"):
        find_images([str(tmp_path / "empty.txt")])


def coco(tmp_path, **changes):
    images = [{"id": 40, "file_name": "x/a.png"}, {"id": 7, "file_name": "b.png"}]
    data = {"images": images, "categories": [{"id": 3, "name": "cat", "extra": 1}], **changes}
    (tmp_path / "few.json").write_text(json.dumps(data))
    return str(tmp_path / "few.json")


def test_a_coco_file_keeps_ids_names_and_categories(tmp_path):
    source = find_images([coco(tmp_path)], "/pictures")
    assert [(r.image_id, r.name) for r in source.records] == [(40, "x/a.png"), (7, "b.png")]
    assert places(source) == ["/pictures/x/a.png", "/pictures/b.png"]
    assert source.categories == [{"id": 3, "name": "cat"}]


def test_images_of_a_coco_file_may_be_elsewhere_and_folders_of_no_file_are_refused(tmp_path):
    source = find_images([coco(tmp_path)], "s3://bucket/x")
    assert places(source) == ["s3://bucket/x/x/a.png", "s3://bucket/x/b.png"]
    with pytest.raises(UserError, match="--images is the folder of the images of a COCO file"):
        find_images(["a.png"], "pictures")
    with pytest.raises(UserError, match="a COCO file has to be here"):
        find_images(["s3://bucket/a.json"])
    with pytest.raises(UserError, match="cannot read gone.json"):
        find_images(["gone.json"])


def test_images_of_a_coco_file_are_where_it_says_or_beside_it(tmp_path):
    assert places(find_images([coco(tmp_path)]))[1] == f"{tmp_path}/b.png"
    (tmp_path / "images").mkdir()
    assert places(find_images([coco(tmp_path)]))[1] == f"{tmp_path}/images/b.png"
    (tmp_path / "said").mkdir()
    path = coco(tmp_path, info={"image_folder": "said"})
    assert places(find_images([path]))[1] == f"{tmp_path}/said/b.png"


@pytest.mark.parametrize(
    "images", [None, [], [{"id": 1}], [{"id": "x", "file_name": "a"}], [3]] + [
        [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]
    ],
)  # fmt: skip
def test_coco_files_without_proper_images_are_refused(tmp_path, images):
    with pytest.raises(UserError, match="few.json.*(lists no 'images'|image . needs a file_name)"):
        find_images([coco(tmp_path, images=images)])


def test_ids_are_numbers_where_a_coco_file_is_one_of_several_inputs(tmp_path):
    touch(tmp_path, "c.png")
    source = find_images([str(tmp_path / "c.png"), coco(tmp_path)])
    assert [r.image_id for r in source.records] == [1, 2, 3] and source.categories == []


@pytest.fixture
def tar(tmp_path):
    """A tar file as webdataset has it: two images with their labels."""
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for number in (1, 2):
            file = io.BytesIO()
            Image.new("RGB", (4, 3), (number, 0, 9)).save(file, "PNG")
            for name, data in ((f"{number:04d}.png", file.getvalue()), ("0001.cls", b"7")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def test_images_in_a_tar_file_are_read_in_place(tar, tmp_path):
    records = find_images([str(tar)]).records
    assert [r.name for r in records] == [f"{tar}/0001.png", f"{tar}/0002.png"]
    assert [r.read()[0, 0].tolist() for r in records[::-1]] == [[9, 0, 2], [9, 0, 1]]
    (tmp_path / "packed.tar.gz").touch()
    with pytest.raises(UserError, match="unpack it once"):
        find_images([str(tmp_path / "packed.tar.gz")])
    (tmp_path / "broken.tar").write_bytes(tar.read_bytes()[100:900])
    with pytest.raises(UserError, match="broken.tar (is no tar file|: the tar file holds no)"):
        find_images([str(tmp_path / "broken.tar")])


def test_addresses_are_files_folders_patterns_and_tar_files(tar, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    Image.new("RGB", (4, 3), (5, 6, 7)).save(tmp_path / "a.png")
    for name, file in (("a.png", tmp_path / "a.png"), ("b.png", tmp_path / "a.png")):
        system.pipe_file(f"/sources/{name}", file.read_bytes())
    system.pipe_file("/sources/shard.tar", tar.read_bytes())
    both = ["memory:///sources/a.png", "memory:///sources/b.png"]
    assert places(find_images(["memory://sources/"])) == both
    assert places(find_images(["memory://sources/*.png"])) == both
    (record,) = find_images(["memory://sources/b.png"]).records
    assert record.read()[0, 0].tolist() == [7, 6, 5]
    records = find_images(["memory://sources/shard.tar"]).records
    assert records[1].read()[0, 0].tolist() == [9, 0, 2]
    with pytest.raises(UserError, match="memory://sources/gone.png cannot be read"):
        find_images(["memory://sources/gone.png"]).records[0].read()
    with pytest.raises(UserError, match="nosuch://a.png"):
        find_images(["nosuch://a.png"]).records[0].read()


@pytest.fixture
def clip(tmp_path):
    """A video of six frames, ever brighter."""
    path = str(tmp_path / "clip.mp4")
    video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (64, 48))
    for number in range(6):
        video.write(np.full((48, 64, 3), 40 * number, np.uint8))
    video.release()
    return path


def test_a_video_is_its_frames(clip):
    source = open_source([clip])
    assert source.total == 6 and source.frame_rate == 5
    records = list(source.records)
    assert [r.image_id for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[2].name.endswith("clip_000003.mp4")
    assert [round(r.read().mean() / 40) for r in records] == [0, 1, 2, 3, 4, 5]


def test_videos_are_alone_and_cannot_be_parted(clip, tmp_path):
    touch(tmp_path, "a.png", "broken.avi")
    with pytest.raises(UserError, match="the only input"):
        open_source([clip, str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="in their order only"):
        find_images([clip])
    with pytest.raises(UserError, match="broken.avi: this video cannot be opened"):
        open_source([str(tmp_path / "broken.avi")])
    with pytest.raises(UserError, match="no such video"):
        open_source([str(tmp_path / "gone.avi")])
    with pytest.raises(UserError, match="a webcam has a number"):
        open_source(["webcam:front"])


def test_a_webcam_goes_on_until_it_is_gone(monkeypatch):
    class Camera:
        frames = [(True, np.zeros((4, 4, 3), np.uint8))] * 3 + [(False, None)]
        released = False

        def __init__(self, number):
            assert number == 2
            self._left = iter(self.frames)

        def isOpened(self):
            return True

        def get(self, key):
            return 0.0

        def read(self):
            return next(self._left)

        def release(self):
            Camera.released = True

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    source = open_source(["webcam:2"])
    assert source.total is None and source.frame_rate == 25
    assert [r.name for r in source.records] == [f"webcam2_{i:06d}" for i in (1, 2, 3)]
    assert Camera.released
