"""The SDS split of the SBD annotations on PASCAL VOC 2012 (Hariharan et al., ECCV 2014), which MNC
and FCIS report mAP^r on: where the files lie, and their registration as `voc_sds_{train,val}`.

Registering reads no file; the annotations are read when the records are first used.
"""

import hashlib
import os
import tempfile

from d2ext.data.register import load_coco_records
from d2ext.data.voc_sds.coco import update_cache
from d2ext.data.voc_sds.files import CLASSES

from detectron2.data import DatasetCatalog, MetadataCatalog


def cache_file(split, root):
    """Where the annotations of a split are kept as one COCO instances file.

    In the data set folder or, where that cannot be written to, in a folder of this user's beside
    the other temporary files.
    """
    name = f"voc_sds_{split}.json"
    if os.path.isdir(root) and not os.access(root, os.W_OK):
        key = hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return os.path.join(tempfile.gettempdir(), f"d2ext-{user}", key, name)
    return os.path.join(root, "voc_sds_cache", name)


def paths(split, root):
    """`json_file` and `image_root` of a split, as they stand in its metadata."""
    return {"json_file": cache_file(split, root), "image_root": root}


def register(name, split, root):
    """Register one split under a name.

    Args:
        name: new data set name.
        split: a key of `files.SPLITS`.
        root: folder of all data sets.
    """
    files = paths(split, root)

    def load():
        update_cache(split, root, files["json_file"])
        return load_coco_records(name, **files)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        ignore_label=255,
        evaluator_type="voc_sds",
        **files,
    )
