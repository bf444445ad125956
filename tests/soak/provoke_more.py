"""How the mistakes of `mistakes` are made: functions of a `Scene` that return what was seen, and
functions that make such functions."""

import json

import cv2
import numpy as np
import torch

from d2ext import ops
from d2ext.engine import Predictor, fit

from tests.soak.scene import CONFIG

FEATURES, ROIS = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 1, 1, 6, 6]])


def d2ext(line):
    """A line of the command `d2ext`, in an empty folder."""
    return lambda scene: scene.d2ext(*line.split())


def with_file(name, text, line):
    """A line of `d2ext` in a folder with one file."""

    def provoke(scene):
        scene.write(name, text)
        return scene.d2ext(*line.split())

    return provoke


def config(text, name="own.yaml", *more):
    """A training by a config of one's own."""

    def provoke(scene):
        path = scene.write(name, text)
        return scene.outcome_of(["--config-file", path, *more])

    return provoke


def data(change):
    """A training on data of which the file was changed."""

    def change_file(content, images):
        change(content)

    return lambda scene: scene.with_data(change_file)


def first_image(**values):
    return data(lambda content: content["images"][0].update(values))


def project(name, *options):
    """A training of another tiny network on the same data."""

    def provoke(scene):
        kept = scene.options()[2:4]  # --register
        sets = ["DATASETS.TRAIN=few", "DATASETS.TEST=()", "MODEL.DEVICE=cpu", "OUTPUT_DIR=run"]
        argv = [f"{name}_tiny", *kept, *sets, "SOLVER.MAX_ITER=1", *options]
        return scene.outcome_of(argv)

    return provoke


def predict(line, weights=True):
    """A line of `d2ext predict`; PICTURE stands for one that is there."""

    def provoke(scene):
        given = ["--config-file", f"{CONFIG}.yaml", "--output", "pictures"]
        given += ["--weights", scene.weights] if weights else ["MODEL.WEIGHTS="]
        found = [picture(scene) if word == "PICTURE" else word for word in line.split()]
        return scene.d2ext("predict", "MODEL.RESNETS.NORM=GN", *given, *found)

    return provoke


def python(function):
    """A call from Python that raises a `UserError`."""
    return lambda scene: scene.outcome(lambda: function(scene))


def operator(function):
    """A call of an operator, which raises what PyTorch raises."""

    def provoke(scene):
        try:
            return f"no error: {function()}"
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return scene.brief(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    return provoke


def used_folder(scene):
    for name in ("config.yaml", "metrics.json", "model_0000003.pth"):
        scene.write(f"run/{name}", "")
    return scene.command()


def split_folder(scene, *parts):
    content = (scene.source / "few.json").read_text()
    for part in parts:
        scene.write(f"mydata/{part}.json", content)
    return "mydata"


def without_images(scene):
    return scene.d2ext(
        "train", "mask_rcnn_tiny", "--data", split_folder(scene, "train"), "--images", "no"
    )


def eval_without_test(scene):
    folder = split_folder(scene, "train")
    return scene.d2ext(
        "eval", "mask_rcnn_tiny", "--data", folder, "--images", f"{scene.source}/images"
    )


def train_without_train(scene):
    folder = split_folder(scene, "val")
    return scene.d2ext(
        "train", "mask_rcnn_tiny", "--data", folder, "--images", f"{scene.source}/images"
    )


def without_test_set(scene):
    return scene.command("--eval-only", "DATASETS.TEST=()", f"MODEL.WEIGHTS={scene.weights}")


def stages_of_one(scene):
    words = ("--config-file", f"{CONFIG}.yaml", "--weights", scene.weights)
    settings = ("DATASETS.TEST=few", "MODEL.RESNETS.NORM=GN", "MODEL.DEVICE=cpu")
    return scene.d2ext("stages", *words, *scene.options()[2:4], *settings)


def registered_twice(scene):
    return scene.command("--register", f"few={scene.source / 'few.json'},{scene.source}")


def two_sets_of_a_recipe(scene):
    text = f"={scene.source / 'few.json'},{scene.source / 'images'}"
    names = [x for name in "abc" for x in ("--register", name + text)]
    return scene.d2ext("train", "mask_rcnn_tiny_finetune", *names, "OUTPUT_DIR=run")


def other_test_classes(scene):
    content = json.loads((scene.source / "few.json").read_text())
    content["categories"] = content["categories"][:3]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 3]
    path = scene.write("fewer.json", json.dumps(content))
    more = ["--register", f"fewer={path},{scene.source / 'images'}", "DATASETS.TEST=fewer"]
    return scene.command(*more)


def weights_file(name, content):
    """A training that starts from a file with something else in it."""

    def provoke(scene):
        path = scene.folder / name
        if isinstance(content, dict):
            torch.save(content, path)
        else:
            path.write_text(content)
        return scene.command(f"MODEL.WEIGHTS={path}")

    return provoke


def predictor_of(image):
    return python(lambda scene: scene.predictor()(image))


def fitted(*args, **options):
    def run(scene):
        files = (str(scene.source / "few.json"), str(scene.source / "images"))
        given = [files if x == "files" else x for x in args]
        return fit(*given, output_dir=str(scene.folder / "run"), **options)

    return python(run)


def picture(scene):
    return str(sorted((scene.source / "images").iterdir())[0])


def broken_picture(scene):
    scene.write("photo.jpg", "no picture")
    return predict("--input photo.jpg")(scene)


def output_is_a_file(scene):
    scene.write("pictures", "")
    return predict("--input PICTURE")(scene)


def overwrites_the_photo(scene):
    cv2.imwrite(str(scene.folder / "photo.png"), cv2.imread(picture(scene)))
    return predict("--input photo.png --output .")(scene)


def weights_without_config(scene):
    words = ("--output", "pictures", "--input", picture(scene))
    return scene.d2ext("predict", "--weights", scene.weights, *words)


def predictor_without_weights(scene):
    return Predictor(scene.experiment("MODEL.WEIGHTS="))


def second_derivative():
    features = FEATURES.clone().requires_grad_()
    total = ops.roi_warp(features, ROIS, 4, 1.0).square().sum()
    (gradient,) = torch.autograd.grad(total, features, create_graph=True)
    gradient.sum().backward()


def labelme(**changes):
    """Conversion of a folder with one file of labelme."""

    def provoke(scene):
        (scene.folder / "photos").mkdir()
        cv2.imwrite(str(scene.folder / "photos/a.png"), np.zeros((20, 30, 3), np.uint8))
        points = [[1, 1], [9, 1], [9, 9]]
        content = {
            "imagePath": "a.png",
            "imageHeight": 20,
            "imageWidth": 30,
            "shapes": [{"label": "bolt", "points": points, "shape_type": "polygon"}],
        }
        text = changes.pop("text", None) or json.dumps({**content, **changes})
        scene.write("photos/a.json", text)
        return scene.d2ext(*"convert labelme photos --output my.json".split())

    return provoke


def yolo(line):
    """Conversion of a YOLO set with one image and one line."""

    def provoke(scene):
        (scene.folder / "images").mkdir()
        cv2.imwrite(str(scene.folder / "images/a.png"), np.zeros((20, 30, 3), np.uint8))
        scene.write("labels/a.txt", line)
        scene.write("data.yaml", "train: images\nnames: [bolt, nut]\n")
        return scene.d2ext(*"convert yolo data.yaml --output my.json".split())

    return provoke
