"""Mistakes with many images: inputs, formats, jobs. Entries are those of `mistakes.MISTAKES`."""

import runpy
import sys
from unittest import mock

from tests.soak.provoke_more import CONFIG, d2ext, predict, with_file
from tests.soak.scene import ROOT


def job(scene, *words):
    """A line of `d2ext predict-job` on a folder of images."""
    model = ["--config-file", f"{CONFIG}.yaml", "--weights", scene.weights, "--output", "job"]
    small = ["MODEL.RESNETS.NORM=GN", "MODEL.DEVICE=cpu", "INPUT.MIN_SIZE_TEST=32"]
    images = ["--input", str(scene.source / "images")]
    return scene.d2ext("predict-job", *model, *images, *small, *words)


def continued_otherwise(*words):
    """A job that is continued with other words than it was begun with."""

    def provoke(scene):
        job(scene)
        return job(scene, *words)

    return provoke


def page(name, hidden=()):
    """A line of `demo/app.py` for a file, without the packages that are hidden."""

    def provoke(scene):
        program = runpy.run_path(str(ROOT / "demo/app.py"))["main"]
        scene.write(name, "")
        with mock.patch.dict(sys.modules, dict.fromkeys(hidden)):
            return scene.outcome_of([name], program)

    return provoke


MANY_IMAGES = [
    ("batches of no image", "at least 1 image", predict("--input PICTURE --batch-size 0")),
    ("a negative number of workers", "-1 processes", predict("--input PICTURE --workers -1")),
    ("an unknown format", "'voc'", predict("--input PICTURE --write voc")),
    (
        "a list of images that is empty",
        "is empty",
        with_file("a.txt", "", "predict --input a.txt --output out"),
    ),
    (
        "a JSON file that is no COCO file, as input",
        "COCO file",
        with_file("a.json", "{}", "predict --input a.json --output out"),
    ),
    (
        "a packed tar file as input",
        "unpack it",
        with_file("a.tar.gz", "", "predict --input a.tar.gz --output out"),
    ),
    ("a video that does not exist", "no such video", d2ext("predict --input a.mp4 --output out")),
    (
        "a webcam without a number",
        "has a number",
        d2ext("predict --input webcam:front --output out"),
    ),
    (
        "a video as input of a job",
        "in their order only",
        d2ext("predict-job --input a.mp4 --output job"),
    ),
    ("shards of no image", "--shard-size is 0", lambda scene: job(scene, "--shard-size", "0")),
    (
        "a job continued with another threshold",
        "0.5 then, 0.3 now",
        continued_otherwise("--confidence-threshold", "0.3"),
    ),
    (
        "a job continued with another config",
        "other config",
        continued_otherwise("MODEL.RPN.NMS_THRESH=0.5"),
    ),
]
PAGE = [
    ("a program of torch.export for the page", r"model\.pt2 cannot be shown", page("model.pt2")),
    (
        "predictions for the page",
        r"predictions\.json cannot be shown",
        page("predictions.json"),
    ),
    ("the page without Gradio", "the package gradio", page("model.onnx", hidden=["gradio"])),
]
