"""Registration of the shapes data set, `shapes_{train,val,big_train,big_val}` and
`shapes_scenes_{train,val}`, or its first images.

Registering reads and writes nothing; a split is generated when its records are first used.
"""

import os

from d2ext.data.catalog import datasets_root
from d2ext.data.register import load_coco_records
from d2ext.data.shapes.draw import THING_CLASSES
from d2ext.data.shapes.files import generate, split_folder, stuff_classes

from detectron2.data import DatasetCatalog, MetadataCatalog


def paths(split, root):
    """`json_file`, `image_root` and `sem_seg_root` of a split, as they stand in its metadata."""
    folder = split_folder(split, root)
    return {
        "json_file": os.path.join(folder, "annotations.json"),
        "image_root": os.path.join(folder, "images"),
        "sem_seg_root": os.path.join(folder, "semantic"),
    }


def register_shapes(name, split, root=None, num_images=None):
    """Register a generated shapes split, or its first images only, under a name.

    Args:
        name: new data set name.
        split: a key of `SPLITS`.
        root: folder of all data sets, default `datasets_root()`.
        num_images: keep only the first images. Use a root of its own then: the folder of a
            split holds one number of images at a time.
    """
    root = root or datasets_root()
    files = paths(split, root)

    def load():
        generate(split, root, num_images)
        return load_coco_records(name, **files)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(THING_CLASSES),
        stuff_classes=stuff_classes(),
        ignore_label=255,
        evaluator_type="coco",
        **files,
    )
