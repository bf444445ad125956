"""Further mistakes that people make, beside those of `faults`: together they are the table of
`docs/errors.md`.

A mistake is `(what, words of the message, function of a Scene)`; every one ends in one line.
"""

import json

import cv2
import numpy as np
import torch

from d2ext import ops
from d2ext.engine import Predictor, fit
from d2ext.evaluation import boundary_iou

from tests.soak.provoke import first, option, text

FEATURES, ROIS = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 1, 1, 6, 6]])


def d2ext(*words):
    """A line of the command `d2ext`, in an empty folder."""
    return lambda scene: scene.d2ext(*words)


def with_file(name, text, *words):
    """A line of `d2ext` in a folder with one file."""

    def provoke(scene):
        scene.write(name, text)
        return scene.d2ext(*words)

    return provoke


def config(text, name="own.yaml", *more):
    """A training by a config of one's own."""

    def provoke(scene):
        path = scene.write(name, text)
        return scene.outcome_of(["--config-file", path, *more])

    return provoke


def data(change):
    """A training on data of which the file was changed."""
    return lambda scene: scene.with_data(lambda content, images: change(content))


def first_image(**values):
    return data(lambda content: content["images"][0].update(values))


def project(name, *options):
    """A training of another tiny network on the same data."""

    def provoke(scene):
        kept = scene.options()[2:4]  # --register
        sets = ["DATASETS.TRAIN=few", "DATASETS.TEST=()", "MODEL.DEVICE=cpu", "OUTPUT_DIR=run"]
        argv = [f"{name}_tiny", *kept, *sets, "MODEL.WEIGHTS=", "SOLVER.MAX_ITER=1", *options]
        return scene.outcome_of(argv)

    return provoke


def predict(*words, weights=True):
    """A line of `d2ext predict`; PICTURE stands for one that is there."""

    def provoke(scene):
        given = ["--config-file", "mask_rcnn_tiny", "--output", "pictures"]
        given += ["--weights", scene.weights] if weights else ["MODEL.WEIGHTS="]
        found = [picture(scene) if word == "PICTURE" else word for word in words]
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
    return predict("--input", "photo.jpg")(scene)


def output_is_a_file(scene):
    scene.write("pictures", "")
    return predict("--input", "PICTURE")(scene)


def overwrites_the_photo(scene):
    cv2.imwrite(str(scene.folder / "photo.png"), cv2.imread(picture(scene)))
    return predict("--input", "photo.png", "--output", ".")(scene)


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
        return scene.d2ext("convert", "labelme", "photos", "--output", "my.json")

    return provoke


def yolo(line):
    """Conversion of a YOLO set with one image and one line."""

    def provoke(scene):
        (scene.folder / "images").mkdir()
        cv2.imwrite(str(scene.folder / "images/a.png"), np.zeros((20, 30, 3), np.uint8))
        scene.write("labels/a.txt", line)
        scene.write("data.yaml", "train: images\nnames: [bolt, nut]\n")
        return scene.d2ext("convert", "yolo", "data.yaml", "--output", "my.json")

    return provoke


MISTAKES = {
    "Command line": [
        ("a misspelt command", "nearest: train", d2ext("trian")),
        ("an option that does not exist", "--dta", d2ext("train", "htc_tiny", "--dta", "shapes")),
        (
            "text for a number of GPUs",
            "--num-gpus",
            d2ext("train", "htc_tiny", "--num-gpus", "all"),
        ),
        ("no config", "no config", d2ext("train")),
        ("a misspelt config", "nearest: htc_tiny", d2ext("train", "htc_tinny")),
        ("a folder as config", "'configs'", with_file("configs/a.yaml", "", "train", "configs")),
        ("a JSON file as config", r"my\.json", with_file("my.json", "{}", "train", "my.json")),
        ("an override without a value", "has no value", option("SOLVER.MAX_ITER")),
        ("an override without a key", "no key", option("=3")),
        ("a value for a group of keys", "group of keys", option("SOLVER=3")),
        ("an entry that a list has not", "no entry '5'", option("model.pixel_mean.5=3", kind="py")),
        ("`--epochs` of a config without recipe", "--epochs", option("--epochs", "3")),
        (
            "`--epochs 0`",
            "--epochs is 0",
            d2ext("train", "mask_rcnn_tiny_finetune", "--data", "shapes", "--epochs", "0"),
        ),
        ("`--machine-rank` of one machine", "--machine-rank", option("--machine-rank", "1")),
        ("a used output folder", "already has a run", used_folder),
        ("nothing to check", "--register NAME", d2ext("check")),
        ("`--rows -1`", "--rows", d2ext("check", "--dataset", "shapes_val", "--rows", "-1")),
        ("a list of configs that there are not", "'yolo'", d2ext("list", "yolo")),
        (
            "stages of a network without",
            "no results per stage",
            lambda scene: scene.d2ext(
                "stages",
                "--config-file",
                "mask_rcnn_tiny",
                "--weights",
                scene.weights,
                *scene.options()[2:4],
                "DATASETS.TEST=few",
                "MODEL.RESNETS.NORM=GN",
            ),
        ),
        ("a project with a hyphen", "'my-net'", d2ext("new-project", "my-net", "--into", ".")),
        (
            "a project of a name that is taken",
            "'json'",
            d2ext("new-project", "json", "--into", "."),
        ),
        (
            "a project in a folder that exists",
            "exists already",
            with_file("my_net/a.txt", "", "new-project", "my_net", "--into", "."),
        ),
    ],
    "Data on the command line": [
        (
            "`--data` of what is not there",
            "nowhere",
            d2ext("train", "htc_tiny", "--data", "nowhere"),
        ),
        (
            "`--data` of a file",
            "split it first",
            with_file("my.json", "{}", "train", "htc_tiny", "--data", "my.json"),
        ),
        (
            "`--data` of a folder without `train.json`",
            "no train.json",
            with_file("mydata/a.txt", "", "train", "htc_tiny", "--data", "mydata"),
        ),
        ("a folder of images that does not exist", "image folder no", without_images),
        ("`--images` alone", "--images is for --data", option("--images", "photos")),
        ("`eval` without a test part", "nothing to evaluate on", eval_without_test),
        ("`train` without a train part", "no train part", train_without_train),
        ("`--register` without files", "write NAME=", option("--register", "my")),
        ("`--register` of no file", "no.json does not exist", option("--register", "my=no.json,.")),
        ("one name for two sets", "'few'", registered_twice),
        ("three sets for a recipe", "given 3 times", two_sets_of_a_recipe),
        ("a test set with other classes", "classes", other_test_classes),
        ("no test set", "DATASETS.TEST", option("--eval-only", "DATASETS.TEST=()")),
        ("no training set", "DATASETS.TRAIN", option("DATASETS.TRAIN=()")),
    ],
    "Config files": [
        ("a key that there is not", "MAX_ITR", config("SOLVER: {MAX_ITR: 3}")),
        ("a value of another type", "MAX_ITER", config("SOLVER: {MAX_ITER: many}")),
        ("a list instead of keys", "KEY: value", config("- SOLVER\n")),
        ("an open bracket", "line 2", config("SOLVER:\n  STEPS: [1, 2\n")),
        ("a base that does not exist", "_BASE_", config("_BASE_: none.yaml\n")),
        (
            "a shipped base that does not exist",
            "nearest",
            config("_BASE_: d2ext://mask_rcnn.yaml\n"),
        ),
        ("a base that is the file itself", "leads back", config("_BASE_: own.yaml\n")),
        ("a lazy config without a model", "does not define", config("train = dict()\n", "own.py")),
        ("a lazy config with a syntax error", "line 1", config("train = (\n", "own.py")),
        ("a lazy config that fails", "line 1", config("import nothing_there\n", "own.py")),
    ],
    "Further settings": [
        ("an unknown network", "NoNet", option("MODEL.META_ARCHITECTURE=NoNet")),
        ("an unknown backbone", "no_backbone", option("MODEL.BACKBONE.NAME=no_backbone")),
        ("an unknown optimiser", "'Adam'", option("SOLVER.OPTIMIZER=Adam")),
        ("an unknown schedule", "LR_SCHEDULER|NoLR", option("SOLVER.LR_SCHEDULER_NAME=NoLR")),
        ("text for a rate", "BASE_LR", option("SOLVER.BASE_LR=fast")),
        ("a negative rate", "BASE_LR is -1", option("SOLVER.BASE_LR=-1")),
        ("an unknown precision", "DTYPE", option("SOLVER.AMP.DTYPE=half")),
        (
            "half precision on a CPU",
            "bfloat16",
            option("SOLVER.AMP.ENABLED=true", "SOLVER.AMP.DTYPE=float16"),
        ),
        ("an average that forgets nothing", "EMA_DECAY is 2", option("SOLVER.EMA_DECAY=2")),
        ("a batch of 2 in 3 parts", "ACCUMULATION|parts", option("SOLVER.ACCUMULATION_STEPS=3")),
        ("frozen parts that there are not", "body", option("SOLVER.FREEZE=['body.*']")),
        (
            "a factor for names that there are not",
            "body",
            option("SOLVER.LR_MULTIPLIERS=[['body.', 2]]"),
        ),
        ("a writer that there is not", "comet", option("LOG_WRITERS=[comet]")),
        ("a metric that there is not", "iou", option("TEST.METRICS=[iou]")),
        (
            "a best metric without evaluations",
            "EVAL_PERIOD",
            option("TEST.BEST_METRIC=segm/AP", "DATASETS.TEST=few"),
        ),
        ("images of no size", "MIN_SIZE_TRAIN", option("INPUT.MIN_SIZE_TRAIN=(0,)")),
        ("an unknown order of channels", "INPUT.FORMAT", option("INPUT.FORMAT=HSV")),
        ("an unknown form of masks", "'rle'", option("INPUT.MASK_FORMAT=rle")),
        ("an unknown source of semantic maps", "'yes'", option("INPUT.SEMANTIC=yes")),
        ("more than all images to paste into", "PROB|prob", option("INPUT.COPY_PASTE.PROB=2")),
        ("a turn of hues beyond the circle", "HUE|hue", option("INPUT.COLOR_JITTER.HUE=2")),
        ("jitter to no size", "SIZE|size", option("INPUT.LSJ.ENABLED=true", "INPUT.LSJ.SIZE=[0]")),
        (
            "another number of classes than the data",
            "NUM_CLASSES",
            option("MODEL.ROI_HEADS.NUM_CLASSES=3"),
        ),
        ("an unknown pooler", "NoPooler", option("MODEL.ROI_BOX_HEAD.POOLER_TYPE=NoPooler")),
        ("MNC with four stages", "NUM_STAGES|num_stages", project("mnc", "MODEL.MNC.NUM_STAGES=4")),
        ("an unknown operator of MNC", "mean", project("mnc", "MODEL.MNC.WARP_BIN_REDUCE=mean")),
        ("FCIS without parts", "GROUP_SIZE|group_size", project("fcis", "MODEL.FCIS.GROUP_SIZE=0")),
        (
            "an unknown mean of masks in HTC",
            "first",
            project("htc", "MODEL.HTC.MASK_ENSEMBLE=first"),
        ),
        (
            "semantic features for no head",
            "boxes",
            project("htc", "MODEL.HTC.SEMANTIC.FUSION=[boxes]"),
        ),
    ],
    "Annotation files": [
        ("a list at the top", "few.json", text("[]")),
        ("a class without a name", "categor", data(lambda c: c["categories"][0].pop("name"))),
        ("two classes of one id", "id", data(lambda c: c["categories"][1].update(id=1))),
        ("two classes of one name", "name", data(lambda c: c["categories"][1].update(name="disk"))),
        (
            "ids of classes as text",
            "category_id",
            data(lambda c: c["categories"][0].update(id="1")),
        ),
        (
            "two images of one id",
            "id",
            data(lambda c: c["images"][1].update(id=c["images"][0]["id"])),
        ),
        ("two annotations of one id", "id", data(lambda c: c["annotations"][1].update(id=1))),
        ("an image without a width", "width", data(lambda c: c["images"][0].pop("width"))),
        (
            "an image without a file name",
            "file_name",
            data(lambda c: c["images"][0].pop("file_name")),
        ),
        ("a folder as image", "folder|image", first_image(file_name=".")),
        ("a box of three numbers", "bbox", first(bbox=[1, 2, 3])),
        ("a box of negative size", "negative size", first(bbox=[5, 5, -3, -3])),
        ("no box", "bbox", data(lambda c: c["annotations"][0].pop("bbox"))),
        ("no class", "category_id", data(lambda c: c["annotations"][0].pop("category_id"))),
        ("a polygon of five numbers", "pairs", first(segmentation=[[1, 1, 9, 1, 9]])),
        ("a polygon of two points", "annotation 1|points", first(segmentation=[[1, 1, 9, 1]])),
        (
            "a mask of another size",
            "annotation 1",
            first(segmentation={"size": [3, 3], "counts": [4, 5]}),
        ),
        (
            "runs that do not add up",
            "annotation 1",
            first(segmentation={"size": [96, 128], "counts": [4]}),
        ),
        ("text as mask", "annotation 1", first(segmentation="polygon")),
    ],
    "Conversion": [
        (
            "a source that does not exist",
            "none",
            d2ext("convert", "labelme", "none", "--output", "a.json"),
        ),
        (
            "a file where a folder is needed",
            "needs a folder",
            with_file("a.json", "{}", "convert", "labelme", "a.json", "--output", "b.json"),
        ),
        ("a broken file of labelme", r"a\.json", labelme(text="{")),
        ("a picture of labelme that is gone", r"b\.png", labelme(imagePath="b.png")),
        (
            "a line of labelme's",
            "line",
            labelme(shapes=[{"label": "x", "points": [[1, 1], [2, 2]], "shape_type": "line"}]),
        ),
        ("boxes of YOLO without polygons", "a.txt", yolo("0 0.5 0.5 0.2 0.2\n")),
        ("a class that YOLO's list has not", "a.txt", yolo("7 0.1 0.1 0.2 0.1 0.2 0.2\n")),
        ("pixels instead of fractions in YOLO", "a.txt", yolo("0 10 10 20 10 20 20\n")),
        (
            "masks without a class",
            "class",
            with_file(
                "masks/a.txt",
                "",
                "convert",
                "masks",
                "masks",
                "--images",
                "masks",
                "--output",
                "a.json",
            ),
        ),
        (
            "shares that are more than all",
            "add up to 1",
            with_file(
                "a.json",
                "{}",
                "split",
                "a.json",
                "--images",
                ".",
                "--output",
                "o",
                "--shares",
                "1",
                "1",
                "0",
            ),
        ),
        (
            "a split without images",
            "--images",
            with_file("a.json", "{}", "split", "a.json", "--output", "o"),
        ),
    ],
    "Further weights": [
        (
            "a folder as weights",
            "folder|directory",
            lambda scene: scene.command(f"MODEL.WEIGHTS={scene.source}"),
        ),
        ("a config as weights", "config.yaml", weights_file("config.yaml", "SEED: 3\n")),
        ("an ONNX file as weights", "model.onnx", weights_file("model.onnx", "onnx")),
        ("a dict without weights", "model.pth", weights_file("model.pth", {"epoch": 3})),
        (
            "the weights of another program",
            "other.pth",
            weights_file("other.pth", {"net.0.w": torch.ones(2)}),
        ),
        (
            "weights with NaN",
            "NaN|nan",
            weights_file(
                "nan.pth",
                {"model": {"backbone.fpn_lateral2.weight": torch.full((64, 32, 1, 1), torch.nan)}},
            ),
        ),
        (
            "a checkpoint without config, alone",
            "holds no config",
            weights_without_config,
        ),
    ],
    "Prediction on the command line": [
        ("no weights", "weights", predict("--input", "a.jpg", weights=False)),
        ("weights that do not exist", "no.pth", predict("--weights", "no.pth", "--input", "a.jpg")),
        ("no image", "--input", predict()),
        ("an image that does not exist", "no such image", predict("--input", "a.jpg")),
        ("a folder without images", "holds no images", predict("--input", ".")),
        ("a file that is no image", "photo.jpg", broken_picture),
        (
            "a score in percent",
            "did you mean 0.5",
            predict("--input", "a.jpg", "--confidence-threshold", "50"),
        ),
        ("a file as output folder", "out", output_is_a_file),
        ("pictures over photographs", "would overwrite", overwrites_the_photo),
        ("an unknown device", "'gpu'", predict("--input", "PICTURE", "--device", "gpu")),
    ],
    "Python": [
        (
            "a predictor without config file",
            "none.yaml",
            python(lambda scene: Predictor("none.yaml")),
        ),
        ("a predictor without weights", "no weights", python(predictor_without_weights)),
        ("a grey image", r"\(H, W, 3\)", predictor_of(np.zeros((9, 9), np.uint8))),
        ("an image of floats", "uint8", predictor_of(np.zeros((9, 9, 3), np.float32))),
        ("a network's tensor", "Tensor|tensor", predictor_of(torch.zeros(3, 9, 9))),
        (
            "`fit` with both lengths",
            "not both",
            fitted("mask_rcnn_tiny", "files", max_iter=1, epochs=1),
        ),
        ("`fit` for no epoch", "epochs is 0", fitted("mask_rcnn_tiny", "files", epochs=0)),
        (
            "`fit` with a validation set",
            "'val'",
            fitted("mask_rcnn_tiny", {"train": "files", "val": "files"}),
        ),
        ("`fit` with annotations alone", "image_folder", fitted("mask_rcnn_tiny", ("few.json",))),
        (
            "`fit` with an unknown key",
            "MAX_ITR",
            fitted("mask_rcnn_tiny", "files", **{"SOLVER.MAX_ITR": 1}),
        ),
        (
            "a class as hook",
            "hooks has",
            fitted("mask_rcnn_tiny", "files", max_iter=1, hooks=[dict], **{"DATASETS.TEST": "()"}),
        ),
        (
            "masks of two sizes compared",
            "size|shape",
            python(lambda scene: boundary_iou(np.ones((3, 3), bool), np.ones((4, 4), bool))),
        ),
    ],
    "Operators": [
        (
            "regions without image index",
            r"\(N, 5\)",
            operator(lambda: ops.roi_warp(FEATURES, ROIS[:, 1:], 4, 1.0)),
        ),
        (
            "regions in half precision",
            "float32",
            operator(lambda: ops.roi_warp(FEATURES, ROIS.half(), 4, 1.0)),
        ),
        (
            "features without batch",
            "4 dimensions",
            operator(lambda: ops.roi_warp(FEATURES[0], ROIS, 4, 1.0)),
        ),
        ("a scale of 0", "spatial_scale", operator(lambda: ops.roi_warp(FEATURES, ROIS, 4, 0.0))),
        (
            "an unknown border",
            "border",
            operator(lambda: ops.roi_warp(FEATURES, ROIS, 4, 1.0, border="wrap")),
        ),
        (
            "whole numbers as features",
            "float",
            operator(lambda: ops.roi_warp(FEATURES.long(), ROIS, 4, 1.0)),
        ),
        (
            "score maps that are no multiple",
            "channels|multiple",
            operator(lambda: ops.ps_roi_mean(torch.rand(1, 5, 8, 8), ROIS, 1.0, 2, 4)),
        ),
        ("second derivatives", "derivative|differentiable", operator(second_derivative)),
    ],
}
