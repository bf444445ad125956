"""VOC SDS from real `.mat` files: both layouts, the conversion, its cache, every broken file."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import scipy.io
from PIL import Image

from d2ext.data import InstanceSegMapper, dataset_classes, get_dataset_records, register_all
from d2ext.data import voc_sds as sds
from d2ext.data.voc_sds import coco, files
from d2ext.data.voc_sds.example import LAYOUTS, make_example, write_annotation
from d2ext.errors import UserError

from detectron2.data import MetadataCatalog


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Data set folder with the same images in each layout."""
    folder = tmp_path_factory.mktemp("trees")
    for layout in LAYOUTS:
        make_example(str(folder / layout), layout=layout)
    return folder


@pytest.fixture
def tree(trees, tmp_path):
    """A copy of the first layout that a test may damage: (data set folder, folder of the files)."""
    skip = shutil.ignore_patterns("voc_sds_cache")
    shutil.copytree(trees / "mnc", tmp_path / "data", ignore=skip)
    return tmp_path / "data", tmp_path / "data" / "VOCdevkitSDS"


def mat(folder, kind, name):
    """`Segmentation` of a file, read without the package."""
    struct = {"inst": "GTinst", "cls": "GTcls"}[kind]
    return scipy.io.loadmat(folder / kind / f"{name}.mat")[struct]["Segmentation"][0, 0]


def test_names_and_classes_are_known_before_any_file_is_there(tmp_path):
    register_all(str(tmp_path))
    classes = dataset_classes(["voc_sds_train", "voc_sds_val"])
    assert len(classes) == 20 and classes == sorted(classes)
    assert (classes[0], classes[14], classes[19]) == ("aeroplane", "person", "tvmonitor")
    metadata = MetadataCatalog.get("voc_sds_val")
    assert metadata.evaluator_type == "voc_sds"
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="none of VOCdevkitSDS, VOCdevkit/VOCSDS, .*'inst'"):
        get_dataset_records("voc_sds_train")


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_records_are_what_the_mat_files_say(trees, layout, caplog):
    root = trees / layout
    folder = root / LAYOUTS[layout]
    register_all(str(root))
    for split, count in (("train", 6), ("val", 4)):
        records = get_dataset_records(f"voc_sds_{split}")
        assert len(records) == count
        for record in records:
            name = Path(record["file_name"]).stem
            assert record["image_id"] == int(name.replace("_", ""))
            inst, cls = mat(folder, "inst", name), mat(folder, "cls", name)
            assert (record["height"], record["width"]) == inst.shape
            assert np.asarray(Image.open(record["file_name"])).shape[:2] == inst.shape
            assert len(record["annotations"]) == inst.max() > 0
            for number, annotation in enumerate(record["annotations"], start=1):
                mask = mask_util.decode(annotation["segmentation"]).astype(bool)
                np.testing.assert_array_equal(mask, inst == number)
                assert annotation["category_id"] == np.unique(cls[mask]).item() - 1
                ys, xs = np.nonzero(mask)
                x, y = xs.min(), ys.min()
                box = [x, y, xs.max() - x + 1, ys.max() - y + 1]
                assert annotation["bbox"] == box and annotation["iscrowd"] == 0
    assert "6 images, not the 5623 of the released list" in caplog.text


def test_records_can_be_mapped_for_training(tree):
    register_all(str(tree[0]))
    record = get_dataset_records("voc_sds_train")[0]
    mapper = InstanceSegMapper(is_train=True, augmentations=[], semantic="none")
    sample = mapper(record)
    masks = sample["instances"].gt_masks.tensor.numpy()
    inst = mat(tree[1], "inst", Path(record["file_name"]).stem)
    for number, mask in enumerate(masks, start=1):
        np.testing.assert_array_equal(mask, inst == number)
    assert sample["image"].shape == (3, *inst.shape)


def test_instances_that_are_numbered_with_gaps_and_ignored_pixels(tree):
    root, folder = tree
    labels = np.zeros((72, 96), np.uint8)
    labels[10:20, 10:20], labels[30:40, 30:60], labels[0, :] = 2, 4, 255
    cls = np.where(labels == 2, 7, np.where(labels == 4, 15, 0)).astype(np.uint8)
    name = files.read_list(str(folder), "train")[0]
    for kind, struct, values in (("inst", "GTinst", labels), ("cls", "GTcls", cls)):
        scipy.io.savemat(folder / kind / f"{name}.mat", {struct: {"Segmentation": values}})
    instances = files.read_instances(str(folder), name)
    assert (instances.ids, instances.classes) == ([2, 4], [7, 15])
    write_annotation(str(folder), name, np.zeros((72, 96), np.uint8), [])
    data = coco.convert_split(str(folder), "train", str(root))
    assert len(data["images"]) == 6
    assert data["images"][0]["id"] not in {a["image_id"] for a in data["annotations"]}


# -------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def conversions(monkeypatch):
    """A list that grows with every conversion."""
    done, convert = [], coco.convert_split

    def counting(*args):
        done.append(args)
        return convert(*args)

    monkeypatch.setattr(coco, "convert_split", counting)
    return done


def test_annotations_are_converted_once_and_again_when_a_file_changes(tree, conversions):
    root, folder = tree
    path = sds.cache_file("train", str(root))
    coco.update_cache("train", str(root), path)
    coco.update_cache("train", str(root), path)
    assert len(conversions) == 1
    name = files.read_list(str(folder), "train")[0]
    labels = np.ones((72, 96), np.uint8)
    write_annotation(str(folder), name, labels, [3])
    coco.update_cache("train", str(root), path)
    assert len(conversions) == 2
    data = json.loads(Path(path).read_text())
    assert [a["area"] for a in data["annotations"] if a["image_id"] == 2008000001] == [72 * 96]
    (folder / "train.txt").write_text("2008_000002\n")
    coco.update_cache("train", str(root), path)
    assert len(conversions) == 3
    assert len(json.loads(Path(path).read_text())["images"]) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"info": {}}', '{"info": {"key": "old"}}'])
def test_an_unusable_cache_is_made_anew(tree, conversions, content):
    path = Path(sds.cache_file("val", str(tree[0])))
    path.parent.mkdir()
    path.write_text(content)
    coco.update_cache("val", str(tree[0]), str(path))
    assert len(conversions) == 1 and len(json.loads(path.read_text())["images"]) == 4
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_conversion_leaves_no_file(tree):
    root, folder = tree
    (folder / "cls" / "2008_000003.mat").unlink()
    path = Path(sds.cache_file("train", str(root)))
    with pytest.raises(UserError, match="2008_000003.mat does not exist"):
        coco.update_cache("train", str(root), str(path))
    assert not path.exists()


def test_the_cache_of_a_folder_that_cannot_be_written_lies_with_the_temporary_files(
    tree, monkeypatch, tmp_path
):
    root = str(tree[0])
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != root)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    path = sds.cache_file("val", root)
    assert path.startswith(str(tmp_path / "temporary"))
    register_all(root)
    assert len(get_dataset_records("voc_sds_val")) == 4
    assert os.path.isfile(path) and not os.path.exists(os.path.join(root, "voc_sds_cache"))


def test_a_place_that_cannot_be_written_is_named(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/cache.json"):
        coco.update_cache("val", str(tree[0]), str(tmp_path / "file" / "cache.json"))


# -------------------------------------------------------------------------------------------------
# Broken files


def save(path, struct, **fields):
    scipy.io.savemat(path, {struct: fields} if fields else {"other": 1})


LABELS = np.zeros((72, 96), np.uint8)
LABELS[5:20, 5:30] = 1
DAMAGE = {
    "no image": (lambda f, n: (f / "img" / f"{n}.jpg").unlink(), r"image .*\.jpg does not exist"),
    "no inst": (lambda f, n: (f / "inst" / f"{n}.mat").unlink(), r"inst/.*\.mat does not exist"),
    "no cls": (lambda f, n: (f / "cls" / f"{n}.mat").unlink(), r"cls/.*\.mat does not exist"),
    "empty inst": (
        lambda f, n: (f / "inst" / f"{n}.mat").write_bytes(b""),
        r"inst/.*\.mat is no readable MATLAB 5 file",
    ),
    "text in inst": (
        lambda f, n: (f / "inst" / f"{n}.mat").write_text("<html>404</html>" * 50),
        r"inst/.*\.mat is no readable MATLAB 5 file",
    ),
    "truncated cls": (
        lambda f, n: os.truncate(f / "cls" / f"{n}.mat", 400),
        r"cls/.*\.mat is no readable MATLAB 5 file",
    ),
    "other struct": (
        lambda f, n: save(f / "inst" / f"{n}.mat", "GTinst"),
        r"inst/.*\.mat has no struct GTinst",
    ),
    "cls instead of inst": (
        lambda f, n: shutil.copy(f / "cls" / f"{n}.mat", f / "inst" / f"{n}.mat"),
        r"inst/.*\.mat has no struct GTinst",
    ),
    "matrix instead of struct": (
        lambda f, n: scipy.io.savemat(f / "inst" / f"{n}.mat", {"GTinst": LABELS}),
        r"inst/.*\.mat has no struct GTinst",
    ),
    "other field": (
        lambda f, n: save(f / "inst" / f"{n}.mat", "GTinst", Segments=LABELS),
        r"inst/.*\.mat has no field GTinst.Segmentation",
    ),
    "fractional labels": (
        lambda f, n: save(f / "cls" / f"{n}.mat", "GTcls", Segmentation=LABELS * 0.5),
        r"cls/.*\.mat: GTcls.Segmentation is \(72, 96\) float64, not a matrix of integers",
    ),
    "three dimensions": (
        lambda f, n: save(f / "inst" / f"{n}.mat", "GTinst", Segmentation=np.stack([LABELS] * 3)),
        r"inst/.*\.mat: GTinst.Segmentation is \(3, 72, 96\) uint8, not a matrix",
    ),
    "negative label": (
        lambda f, n: save(
            f / "inst" / f"{n}.mat", "GTinst", Segmentation=LABELS.astype(np.int16) * -1
        ),
        r"inst/.*\.mat: GTinst.Segmentation has the negative label -1",
    ),
    "cls of another size": (
        lambda f, n: save(f / "cls" / f"{n}.mat", "GTcls", Segmentation=LABELS.T),
        r"cls/.*\.mat is 72x96, .*inst/.*\.mat 96x72",
    ),
    "image of another size": (
        lambda f, n: Image.new("RGB", (96, 71)).save(f / "img" / f"{n}.jpg"),
        r"inst/.*\.mat is 96x72, its image .*\.jpg 96x71",
    ),
    "image that is none": (
        lambda f, n: (f / "img" / f"{n}.jpg").write_text("404"),
        r"cannot read image .*\.jpg: ",
    ),
    "two classes in an instance": (
        lambda f, n: save(
            f / "cls" / f"{n}.mat", "GTcls", Segmentation=np.tile(np.uint8([1, 2]), (72, 48))
        ),
        r"cls/.*\.mat: instance 1 of .*inst/.*\.mat covers classes \[1, 2\]",
    ),
    "instance on background": (
        lambda f, n: save(f / "cls" / f"{n}.mat", "GTcls", Segmentation=LABELS * 0),
        r"cls/.*\.mat: instance 1 has class 0, not 1..20",
    ),
    "class that VOC lacks": (
        lambda f, n: save(f / "cls" / f"{n}.mat", "GTcls", Segmentation=LABELS * 0 + 21),
        r"cls/.*\.mat: instance 1 has class 21, not 1..20",
    ),
    "too few categories": (
        lambda f, n: save(
            f / "inst" / f"{n}.mat", "GTinst", Segmentation=mat(f, "inst", n), Categories=[]
        ),
        r"inst/.*\.mat: GTinst.Categories has no entry for instance 1",
    ),
    "contradicting categories": (
        lambda f, n: save(
            f / "inst" / f"{n}.mat", "GTinst", Segmentation=mat(f, "inst", n), Categories=[20] * 9
        ),
        r"inst/.*\.mat: GTinst.Categories says class 20 for instance 1, .*cls/.*\.mat class",
    ),
    "categories that are text": (
        lambda f, n: save(
            f / "inst" / f"{n}.mat", "GTinst", Segmentation=mat(f, "inst", n), Categories="cat"
        ),
        r"inst/.*\.mat: GTinst.Categories is not a list of integers",
    ),
}


@pytest.mark.filterwarnings("ignore")  # scipy warns of some of the files before it raises
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_every_broken_file_gives_one_line_with_its_name(tree, kind):
    root, folder = tree
    damage, message = DAMAGE[kind]
    damage(folder, "2008_000002")
    register_all(str(root))
    with pytest.raises(UserError, match=message) as caught:
        get_dataset_records("voc_sds_train")
    assert "2008_000002" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no image list ImageSets/Main/train.txt or train.txt"),
        ("", "train.txt is empty"),
        ("2008_000001\n2008_000001\n", "train.txt has 2008_000001 twice"),
        ("".join(f"2008_{i:06d}\n" for i in range(8498)), "the split of SBD itself"),
        (b"\xff\xfe2\x000\x00", "train.txt is no list of image names: .* at byte 0"),
    ],
)
def test_unusable_lists_are_named(tree, content, message):
    path = tree[1] / "train.txt"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    register_all(str(tree[0]))
    with pytest.raises(UserError, match=message):
        get_dataset_records("voc_sds_train")
