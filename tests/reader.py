"""What a reader of the pages brings: `photo.jpg`, and `mydata` with annotations of every kind."""

import shutil
from pathlib import Path

import cv2

from tests.data.convert import helpers
from tests.engine.test_first_photos import write_photos

ROOT = Path(__file__).resolve().parents[1]
# What pages name as it lies in the repository.
SEEN = ("configs", "demo", "dev", "docs", "examples", "projects", "tools")


def lay_out(folder, few):
    """Fill an empty folder, as if it were the root of the repository.

    Args:
        folder: a path.
        few: folder of a small set in COCO's format: `few.json`, `images` and `semantic`.
    """
    for name in SEEN:
        (folder / name).symlink_to(ROOT / name)
    mydata = folder / "mydata"
    mydata.mkdir()
    for name in ("annotations.json", "val.json"):
        shutil.copy(few / "few.json", mydata / name)
    for name in ("images", "semantic"):
        shutil.copytree(few / name, mydata / name)
    picture = sorted((few / "images").iterdir())[0]
    cv2.imwrite(str(folder / "photo.jpg"), cv2.imread(str(picture)))

    write_photos(mydata / "photos", 6)
    helpers.write_labelme(mydata / "photos")
    made = folder / "made"
    for name in ("yolo", "voc", "mask files", "cvat", "roboflow"):
        (made / name).mkdir(parents=True)
        helpers.FORMATS[name](made / name)
    shutil.copytree(made / "yolo", mydata, dirs_exist_ok=True)
    for name in ("JPEGImages", "SegmentationObject", "SegmentationClass"):
        shutil.copytree(made / "voc" / name, mydata / name)
    shutil.copytree(made / "mask files/masks", mydata / "masks")
    shutil.copytree(made / "cvat/annotations", mydata / "annotations")
    shutil.copytree(made / "cvat/images/default", mydata / "images/default")
    shutil.copytree(made / "roboflow", mydata / "train")
    shutil.rmtree(made)
