"""Registration of the data sets that d2ext knows by name: the generated `shapes_*` sets, COCO
2017 with semantic maps (`coco_2017_{train,val}_{stuff,panoptic_stuff}`) and VOC 2012 SDS
(`voc_sds_{train,val}`).

Registering reads and writes nothing; a shapes set is generated when its records are first used.
"""

import functools
import logging

from d2ext.data import coco_stuff, shapes, voc_sds
from d2ext.data.catalog import datasets_root, is_registered_as

from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)


def register_all(root=None):
    """Register every built-in data set; calling it again is harmless.

    Args:
        root: folder of all data sets, default $DETECTRON2_DATASETS or `datasets` as read now.
            When it differs from that of an earlier call, the sets move to the new folder with a
            warning.
    """
    root = root or datasets_root()
    builders = [
        (f"shapes_{split}", split, shapes.paths, shapes.register_shapes) for split in shapes.SPLITS
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
