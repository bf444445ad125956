"""Registration of the data sets that d2ext knows by name: the generated `shapes_*` sets, COCO
2017 with semantic maps (`coco_2017_{train,val}_{stuff,panoptic_stuff}`) and VOC 2012 SDS
(`voc_sds_{train,val}`).

Registering reads and writes nothing; a shapes set is generated when its records are first used.
"""

import functools
import logging
import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from . import coco_stuff, shapes, voc_sds
from .register import is_registered_as, load_coco_records

logger = logging.getLogger(__name__)


def _shapes_paths(split, root):
    folder = shapes.split_folder(split, root)
    return {
        "json_file": os.path.join(folder, "annotations.json"),
        "image_root": os.path.join(folder, "images"),
        "sem_seg_root": os.path.join(folder, "semantic"),
    }


def register_shapes(name, split, root=None, num_images=None):
    """Register a generated shapes split, or its first images only, under a name.

    Args:
        name (str): new data set name.
        split (str): a key of `shapes.SPLITS`.
        root (str): folder of all data sets, default `shapes.datasets_root()`.
        num_images (int): keep only the first images. Use a root of its own then: the folder of a
            split holds one number of images at a time.
    """
    root = root or shapes.datasets_root()
    paths = _shapes_paths(split, root)

    def load():
        shapes.generate(split, root, num_images)
        return load_coco_records(name, **paths)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(shapes.THING_CLASSES),
        stuff_classes=shapes.stuff_classes(),
        ignore_label=255,
        evaluator_type="coco",
        **paths,
    )


def register_all(root=None):
    """Register every built-in data set; calling it again is harmless.

    Args:
        root (str): folder of all data sets, default $DETECTRON2_DATASETS or `datasets` as read now.
            When it differs from that of an earlier call, the sets move to the new folder with a
            warning.
    """
    root = root or shapes.datasets_root()
    builders = [
        (f"shapes_{split}", split, _shapes_paths, register_shapes) for split in shapes.SPLITS
    ]
    for split in ("train", "val"):
        for layout in coco_stuff.LAYOUTS:
            paths = functools.partial(coco_stuff.coco_paths, layout=layout)
            register = functools.partial(coco_stuff.register_coco_stuff, layout=layout)
            builders.append((f"coco_2017_{split}_{layout}", split, paths, register))
        builders.append((f"voc_sds_{split}", split, voc_sds.paths, voc_sds.register))
    moved = []
    for name, split, paths, register in builders:
        if is_registered_as(name, **paths(split, root)):
            continue
        if name in DatasetCatalog.list():
            moved.append(name)
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register(name, split, root)
    if moved:
        logger.warning("Moved %s to the data set folder %s", ", ".join(moved), root)
