"""Registration of the data sets that d2ext knows by name: the generated `shapes_*` sets and COCO 2017
with COCO-Stuff maps (`coco_2017_{train,val}_stuff`).

Registering reads and writes nothing. A shapes set is generated when its records are first asked for.
"""

import logging
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from . import shapes

COCO_STUFF_LABELS = 183  # label count of HTC's semantic branch; the maps use 0..181 and 255
_OWN_ROOTS = {}  # data set name -> absolute root it was registered for
logger = logging.getLogger(__name__)


def load_with_semantic(json_file, image_root, sem_seg_root, name):
    """Records of a COCO instances file with `sem_seg_file_name`, the PNG of the image's stem."""
    records = load_coco_json(json_file, image_root, name)
    for record in records:
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        record["sem_seg_file_name"] = os.path.join(sem_seg_root, stem + ".png")
    return records


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
    folder = shapes.split_folder(split, root)
    paths = {
        "json_file": os.path.join(folder, "annotations.json"),
        "image_root": os.path.join(folder, "images"),
        "sem_seg_root": os.path.join(folder, "semantic"),
    }

    def load():
        shapes.generate(split, root, num_images)
        return load_with_semantic(name=name, **paths)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(shapes.THING_CLASSES),
        stuff_classes=shapes.stuff_classes(),
        ignore_label=255,
        evaluator_type="coco",
        **paths,
    )


def _register_coco_stuff(name, split, root):
    # detectron2 registers the plain COCO sets itself, for the root it saw when it was imported;
    # only their class metadata is used here.
    plain = MetadataCatalog.get(f"coco_2017_{split}")
    paths = {
        "json_file": os.path.join(root, f"coco/annotations/instances_{split}2017.json"),
        "image_root": os.path.join(root, f"coco/{split}2017"),
        "sem_seg_root": os.path.join(root, f"coco/stuffthingmaps/{split}2017"),
    }
    DatasetCatalog.register(name, lambda: load_with_semantic(name=name, **paths))
    MetadataCatalog.get(name).set(
        thing_classes=plain.thing_classes,
        thing_dataset_id_to_contiguous_id=plain.thing_dataset_id_to_contiguous_id,
        num_semantic_labels=COCO_STUFF_LABELS,
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
    builders = {f"shapes_{split}": (register_shapes, split) for split in shapes.SPLITS}
    for split in ("train", "val"):
        builders[f"coco_2017_{split}_stuff"] = (_register_coco_stuff, split)
    moved = None
    for name, (register, split) in builders.items():
        if name in DatasetCatalog.list():
            if _OWN_ROOTS.get(name) == os.path.abspath(root):
                continue
            moved = _OWN_ROOTS.get(name, "elsewhere")
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register(name, split, root)
        _OWN_ROOTS[name] = os.path.abspath(root)
    if moved:
        logger.warning("Built-in data sets were registered for %s, now for %s", moved, root)
