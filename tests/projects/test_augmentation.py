"""Every network trains on images with jitter, rotation, changed colours and pasted objects."""

import itertools

import pytest
import torch

from d2ext.engine import build_experiment

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from detectron2.utils.events import EventStorage

_OPTIONS = [
    "INPUT.LSJ.ENABLED=True", "INPUT.LSJ.SIZE=96", "INPUT.LSJ.MIN_SCALE=0.5", "MODEL.WEIGHTS=",
    "INPUT.ROTATE_90=True", "INPUT.COLOR_JITTER.HUE=0.1", "MODEL.DEVICE=cpu",
    "INPUT.MIN_MASK_AREA=4",
]  # fmt: skip


def losses_of(config, name, *options):
    data = [f"DATASETS.TRAIN={name}", f"DATASETS.TEST={name}"]
    experiment = build_experiment(config, [*_OPTIONS, *options, *data])
    samples = list(itertools.chain(*itertools.islice(experiment.build_train_loader(), 2)))
    torch.manual_seed(0)
    with EventStorage():
        return samples, experiment.build_model().train()(samples[:4])


@pytest.mark.parametrize(
    "config",
    [
        "configs/mask_rcnn_tiny.yaml",
        "configs/cascade_mask_rcnn_tiny.yaml",
        "projects/HTC/configs/htc_tiny.yaml",
        "projects/MNC/configs/mnc_tiny.yaml",
        "projects/FCIS/configs/fcis_tiny.yaml",
    ],
)
def test_losses_are_finite(shapes_few, config):
    _, losses = losses_of(config, shapes_few, "INPUT.COPY_PASTE.PROB=0.5")
    assert losses and all(torch.isfinite(loss) for loss in losses.values())


def _with_polygons(name):
    """Records of a data set with each mask replaced by the diamond in its box."""
    records = DatasetCatalog.get(name)
    for record in records:
        for annotation in record["annotations"]:
            x, y, w, h = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            diamond = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
            annotation["segmentation"] = [diamond]
    return records


def test_batches_may_hold_images_with_polygons_and_images_with_bitmaps(shapes_few):
    DatasetCatalog.register("diamonds", lambda: _with_polygons(shapes_few))
    classes = MetadataCatalog.get(shapes_few).thing_classes
    MetadataCatalog.get("diamonds").set(thing_classes=classes, evaluator_type="coco")
    options = ["INPUT.MASK_FORMAT=polygon", "INPUT.COPY_PASTE.PROB=0.25"]
    samples, losses = losses_of("configs/mask_rcnn_tiny.yaml", "diamonds", *options)
    kinds = {type(sample["instances"].gt_masks) for sample in samples[:4]}
    assert kinds == {BitMasks, PolygonMasks}
    assert all(torch.isfinite(loss) for loss in losses.values())
