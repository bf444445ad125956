"""Uses of detectron2 that v0.6 gets wrong on today's stack; a program, run by test_symptoms.py.

`scenarios.py bare` imports detectron2 directly, `scenarios.py adapted` imports d2ext first.
Each prints one JSON object: for every scenario "works" or the text of the error, and what applied.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import types

import numpy as np

VOC_XML = """<annotation><size><width>8</width><height>6</height></size><object><name>cat</name>
<pose>x</pose><truncated>0</truncated><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>2</ymin>
<xmax>5</xmax><ymax>4</ymax></bndbox></object></annotation>"""


def layers():
    import detectron2.layers  # noqa: F401


def transforms():
    import detectron2.data.transforms  # noqa: F401


def environment_report():
    from detectron2.utils.collect_env import collect_env_info

    assert "PyTorch" in collect_env_info()


def mapper_returns_none():
    from detectron2.data import MapDataset

    assert MapDataset([1, 2, 3], lambda x: None if x == 2 else x)[1] in (1, 3)


def class_histogram():
    from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

    record = {"annotations": [{"category_id": 0}]}
    DatasetCatalog.register("histogram", lambda: [record])
    MetadataCatalog.get("histogram").thing_classes = ["cat"]
    messages = []
    handler = logging.Handler()
    handler.emit = lambda r: messages.append(r.getMessage())
    logger = logging.getLogger("detectron2.data.build")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    get_detection_dataset_dicts("histogram")
    assert "Distribution of instances" in " ".join(messages), "no table of classes in the log"


def _voc_folder():
    folder = tempfile.mkdtemp()
    for name in ("Annotations", "ImageSets/Main"):
        os.makedirs(os.path.join(folder, name))
    for name in ("first", "second"):
        with open(os.path.join(folder, "Annotations", name + ".xml"), "w") as f:
            f.write(VOC_XML)
    with open(os.path.join(folder, "ImageSets/Main/train.txt"), "w") as f:
        f.write("first\nsecond\n")
    return folder


def pascal_voc_ids():
    from detectron2.data.datasets.pascal_voc import load_voc_instances

    records = load_voc_instances(_voc_folder(), "train", ["cat"])
    assert [r["image_id"] for r in records] == ["first", "second"]


def semantic_evaluation():
    import torch
    from PIL import Image

    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 2
    path = os.path.join(tempfile.mkdtemp(), "map.png")
    Image.fromarray(labels).save(path)
    DatasetCatalog.register("maps", lambda: [{"file_name": "a", "sem_seg_file_name": path}])
    MetadataCatalog.get("maps").set(stuff_classes=["even", "odd"], ignore_label=255)
    evaluator = SemSegEvaluator("maps", distributed=False)
    evaluator.reset()
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 2).permute(2, 0, 1)
    evaluator.process([{"file_name": "a"}], [{"sem_seg": scores}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100


def polygon_masks():
    from detectron2.structures.masks import polygons_to_bitmask

    assert polygons_to_bitmask([np.array([0.0, 0, 4, 0, 4, 3, 0, 3])], 6, 8).sum() == 12


def panoptic_masks():
    import torch

    from detectron2.data import Metadata
    from detectron2.utils.visualizer import _PanopticPrediction

    metadata = Metadata(stuff_classes=["grass"], thing_classes=["cat"])
    segments = [{"id": 1, "isthing": False, "category_id": 0, "area": 96}]
    prediction = _PanopticPrediction(torch.ones(12, 8, dtype=torch.int64), segments, metadata)
    assert next(iter(prediction.semantic_masks()))[0].all()


def video_colors():
    from detectron2.data import Metadata
    from detectron2.utils.video_visualizer import VideoVisualizer, _DetectedInstance

    found = _DetectedInstance(0, np.array([1.0, 1, 5, 6]), mask_rle=None, color=None, ttl=8)
    assert len(VideoVisualizer(Metadata())._assign_colors([found])) == 1


def pascal_voc_evaluation():
    from detectron2.evaluation.pascal_voc_evaluation import voc_eval

    folder = _voc_folder()
    with open(os.path.join(folder, "cat.txt"), "w") as f:
        f.write("first 0.9 2 2 5 4\nsecond 0.8 2 2 5 4\n")
    _, _, ap = voc_eval(
        os.path.join(folder, "{}.txt"),
        os.path.join(folder, "Annotations", "{}.xml"),
        os.path.join(folder, "ImageSets/Main/train.txt"),
        "cat",
    )
    assert ap == 1


def _coco_evaluator_result(build):
    import torch

    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import Boxes, Instances

    path = os.path.join(tempfile.mkdtemp(), "truth.json")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 3], "area": 12}
    with open(path, "w") as f:
        json.dump(
            {
                "info": {},
                "images": [{"id": 1, "height": 12, "width": 8, "file_name": "a.png"}],
                "annotations": [{**annotation, "iscrowd": 0}],
                "categories": [{"id": 1, "name": "cat"}],
            },
            f,
        )
    if "boxes" not in DatasetCatalog.list():
        DatasetCatalog.register("boxes", lambda: [])
    MetadataCatalog.pop("boxes", None)
    MetadataCatalog.get("boxes").set(
        json_file=path, evaluator_type="coco", thing_dataset_id_to_contiguous_id={1: 0}
    )
    MetadataCatalog.get("boxes").thing_classes = ["cat"]
    evaluator = build("boxes")
    evaluator.reset()
    found = Instances((12, 8), pred_boxes=Boxes(torch.tensor([[1.0, 1, 5, 4]])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    with contextlib.redirect_stdout(sys.stderr):
        results = evaluator.evaluate()
    assert abs(results["bbox"]["AP"] - 100) < 1e-9


def default_coco_evaluation():
    from detectron2.evaluation import COCOEvaluator

    _coco_evaluator_result(lambda name: COCOEvaluator(name, tasks=("bbox",), distributed=False))


def chosen_coco_evaluation():
    from d2ext.evaluation import build_evaluator

    _coco_evaluator_result(build_evaluator)


BOOL_SCENARIOS = (polygon_masks, panoptic_masks, video_colors, pascal_voc_evaluation)
SCENARIOS = (
    layers,
    environment_report,
    transforms,
    mapper_returns_none,
    class_histogram,
    pascal_voc_ids,
    semantic_evaluation,
)


def outcome(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


@contextlib.contextmanager
def numpy_without_bool():
    """numpy 1.24 to 1.26 have no `numpy.bool`; numpy 2 has the name again."""
    saved = vars(np).pop("bool", None)
    try:
        yield
    finally:
        if saved is not None:
            np.bool = saved


def unblock(name):
    """Put away an obstacle of plain detectron2, so that the next one comes into sight."""
    if name == "layers" and "detectron2._C" not in sys.modules:
        import detectron2

        sys.modules["detectron2._C"] = detectron2._C = types.ModuleType("detectron2._C")
    if name == "transforms":
        import PIL.Image

        PIL.Image.LINEAR = PIL.Image.BILINEAR


def main(mode):
    results = {}
    if mode == "adapted":
        import d2ext

        results["applied on import"] = d2ext.compat.applied()
        results["detectron2 modules on import"] = [m for m in sys.modules if "detectron2" in m]
    for function in SCENARIOS[:3]:
        results[function.__name__] = outcome(function)
        if mode == "bare":
            unblock(function.__name__)
    # Load the modules first: only what they do themselves is to run without numpy.bool.
    import detectron2.evaluation
    import detectron2.utils.video_visualizer  # noqa: F401

    with numpy_without_bool():
        if mode == "adapted":
            d2ext.compat.patch_data()
            d2ext.compat.patch_structures()
            d2ext.compat.patch_evaluation()
            d2ext.compat.patch_visualization()
        for function in BOOL_SCENARIOS:
            results[function.__name__] = outcome(function)
    for function in SCENARIOS[3:]:
        results[function.__name__] = outcome(function)
    if mode == "adapted":
        results[default_coco_evaluation.__name__] = outcome(default_coco_evaluation)
        results[chosen_coco_evaluation.__name__] = outcome(chosen_coco_evaluation)
        results["numpy has int"] = "int" in vars(np)
        results["compiled"] = d2ext.compat.has_compiled_detectron2()
        results["applied"] = d2ext.compat.applied()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
