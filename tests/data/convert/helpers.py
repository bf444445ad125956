"""The same photo-like data set as five programs write it, by code that shares nothing with the
converters."""

import json
from collections import namedtuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

CLASSES = ["cell", "leaf", "stone"]
SIZE = (64, 48)  # width and height
Object = namedtuple("Object", "name polygon")


def photo(seed, size=SIZE):
    """uint8 (H, W, 3): smooth shades and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    image = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC).astype(int)
    return (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)


# Polygons on whole pixels that do not overlap; the last picture is empty.
PICTURES = {
    "a.png": [
        Object("leaf", [4, 4, 20, 6, 16, 22, 6, 18]),
        Object("stone", [30, 5, 50, 5, 40, 20]),
        Object("leaf", [30, 30, 60, 30, 60, 44, 44, 36, 30, 44]),
    ],
    "b.png": [Object("cell", [10, 10, 30, 10, 30, 30, 10, 30])],
    "c.png": [],
}


def drawn(polygon, size=SIZE):
    """uint8 (H, W) of 0 and 1."""
    return mask_util.decode(mask_util.frPyObjects([polygon], size[1], size[0]))[..., 0]


def write_photos(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(PICTURES):
        Image.fromarray(photo(seed)).save(folder / name)
    return folder


def write_labelme(folder):
    """Returns what the tool is given."""
    write_photos(folder)
    for name, objects in PICTURES.items():
        shapes = [
            {
                "label": x.name,
                "points": np.reshape(x.polygon, (-1, 2)).astype(float).tolist(),
                "group_id": None,
                "shape_type": "polygon",
                "flags": {},
            }
            for x in objects
        ]
        data = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": name}
        data.update(imageData=None, imageHeight=SIZE[1], imageWidth=SIZE[0])
        (folder / name).with_suffix(".json").write_text(json.dumps(data, indent=2))
    return ["labelme", folder, "--classes", ",".join(CLASSES)]


def write_yolo(folder):
    write_photos(folder / "images/train")
    (folder / "labels/train").mkdir(parents=True)
    for name, objects in PICTURES.items():
        lines = []
        for x in objects:
            fractions = (np.reshape(x.polygon, (-1, 2)) / SIZE).ravel()
            lines.append(f"{CLASSES.index(x.name)} " + " ".join(f"{v:.6g}" for v in fractions))
        file = folder / "labels/train" / name
        file.with_suffix(".txt").write_text("\n".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nnames:\n{names}")
    return ["yolo", folder / "data.yaml", "--images", folder / "images/train"]


def write_voc(folder):
    """VOC's folders: objects and classes as indices of a palette, with an unlabelled pixel."""
    images = write_photos(folder / "JPEGImages")
    for kind in ("SegmentationObject", "SegmentationClass"):
        (folder / kind).mkdir()
        for name, objects in PICTURES.items():
            values = np.zeros(SIZE[::-1], np.uint8)
            for number, x in enumerate(objects, start=1):
                label = number if kind.endswith("Object") else CLASSES.index(x.name) + 1
                values[drawn(x.polygon) > 0] = label
            values[0, 0] = 255
            picture = Image.fromarray(values, "P")
            picture.putpalette(list(range(256)) * 3)
            picture.save(folder / kind / name)
    maps = ["--class-maps", folder / "SegmentationClass", "--classes", ",".join(CLASSES)]
    return ["masks", folder / "SegmentationObject", "--images", images, *maps]


def write_mask_files(folder):
    """A folder per image with a file per object."""
    images = write_photos(folder / "images")
    for name, objects in PICTURES.items():
        own = folder / "masks" / name.removesuffix(".png")
        own.mkdir(parents=True)
        for number, x in enumerate(objects):
            Image.fromarray(drawn(x.polygon) * 255).save(own / f"{x.name}_{number}.png")
    return ["masks", folder / "masks", "--images", images, "--classes", ",".join(CLASSES)]


def coco(first_category):
    """A COCO file with ids that have gaps."""
    images, annotations = [], []
    for i, (name, objects) in enumerate(PICTURES.items()):
        images.append({"id": 10 * i, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for x in objects:
            annotations.append(
                {
                    "id": 5 * len(annotations),
                    "image_id": 10 * i,
                    "category_id": CLASSES.index(x.name) + first_category,
                    "segmentation": [x.polygon],
                    "bbox": [0, 0, 1, 1],
                    "area": 1.5,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": n} for i, n in enumerate(CLASSES, start=first_category)]
    return {"images": images[::-1], "annotations": annotations, "categories": categories}


def write_cvat(folder):
    write_photos(folder / "images/default")
    (folder / "annotations").mkdir()
    file = folder / "annotations/instances_default.json"
    file.write_text(json.dumps({"licenses": [], "info": {}, **coco(1)}))
    return ["cvat", file]


def write_roboflow(folder):
    write_photos(folder)
    data = coco(1)
    for category in data["categories"]:
        category["supercategory"] = "garden"
    data["categories"].insert(0, {"id": 0, "name": "garden", "supercategory": "none"})
    file = folder / "_annotations.coco.json"
    file.write_text(json.dumps(data, indent=1))
    return ["roboflow", file]


FORMATS = {
    "labelme": write_labelme,
    "yolo": write_yolo,
    "voc": write_voc,
    "mask files": write_mask_files,
    "cvat": write_cvat,
    "roboflow": write_roboflow,
}
