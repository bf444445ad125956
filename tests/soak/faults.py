"""What can go wrong, by whose hand ever, and what has to come of it: the table of
`docs/reliability.md`.

A fault is `(what, what has to happen, words of the outcome, function of a Scene)`.
"""

import signal

from tests.soak import provoke

REFUSED = "refused, naming the key"
NAMED = "refused, naming the file"
CAUSE = "refused, naming the likely cause"

FAULTS = {
    "Runs": [
        ("training again in a used folder", "refused", "already has a run", provoke.again),
        (
            "the same with `--overwrite`",
            "the old run is moved",
            "3 checkpoints|checkpoints moved",
            provoke.overwritten,
        ),
        (
            "two trainings in one folder",
            "the second is refused",
            "is training in",
            provoke.second_training,
        ),
        (
            "a training after one that was killed",
            "runs",
            "^exit 0",
            provoke.after_a_killed_training,
        ),
        (
            "Ctrl-C in the middle",
            "saves, resumes exactly",
            "exit 130, .*same weights",
            provoke.interrupted(signal.SIGINT),
        ),
        (
            "SIGTERM in the middle",
            "saves, resumes exactly",
            "exit 130, .*same weights",
            provoke.interrupted(signal.SIGTERM),
        ),
        (
            "the newest checkpoints are cut off",
            "continued from the newest good one",
            "model_0000003.pth; .*same weights",
            provoke.damaged_last(provoke.cut),
        ),
        (
            "a bit of the newest checkpoints has flipped",
            "continued from the newest good one",
            "model_0000003.pth; .*same weights",
            provoke.damaged_last(provoke.flipped),
        ),
        (
            "the newest checkpoints are gone",
            "continued from the newest good one",
            "model_0000003.pth; .*same weights",
            provoke.damaged_last(lambda path: path.unlink()),
        ),
        (
            "killed before `model_final.pth`",
            "resuming completes it",
            "same weights",
            provoke.without_final,
        ),
        (
            "disk full at a save",
            "goes on, saves at the next period",
            "^exit 0, saved model_0000003",
            provoke.full_disk,
        ),
        ("the output folder is a file", REFUSED, "OUTPUT_DIR", provoke.folder_not_writable),
        (
            "a command that fails in a used folder",
            "its config stays",
            "as before",
            provoke.failed_command,
        ),
        (
            "NaN in a batch",
            "images, losses, rate, advice",
            "images .*learning rate",
            provoke.nan_loss,
        ),
        (
            "resuming with other classes",
            "refused, naming both",
            "other disk|classes",
            provoke.other_classes,
        ),
    ],
    "Weights": [
        ("a flipped bit", NAMED, "model.pth.*checksum", provoke.weights_changed(provoke.flipped)),
        (
            "a file cut off",
            NAMED,
            "model.pth.*cannot be read",
            provoke.weights_changed(provoke.cut),
        ),
        (
            "an empty file",
            NAMED,
            "model.pth",
            provoke.weights_changed(lambda p: p.write_bytes(b"")),
        ),
        (
            "a page of HTML instead",
            NAMED,
            "model.pth",
            provoke.weights_changed(lambda p: p.write_text("<html>")),
        ),
        (
            "a key that takes for ever to hash",
            NAMED,
            "no text and no number",
            provoke.weights_changed(provoke.hostile_pickle),
        ),
        (
            "a program in the archive",
            NAMED,
            "model.pth",
            provoke.weights_changed(provoke.program_in_archive),
        ),
        ("no such file", NAMED, "nowhere.pth.*does not exist", provoke.evaluated("nowhere.pth")),
        (
            "an address that is not there",
            NAMED,
            "cannot download",
            provoke.evaluated("https://127.0.0.1:9/model.pth"),
        ),
        (
            "weights of another network",
            "refused",
            "lacks|fit",
            provoke.weights_changed(lambda p: None, "MODEL.FPN.OUT_CHANNELS=32"),
        ),
        ("categories in reverse order", "refused, naming both", "order", provoke.reversed_ids),
        (
            "another standard deviation than in the training",
            "refused, both values",
            "PIXEL_STD was",
            provoke.other_pixels,
        ),
    ],
    "Settings": [
        ("a misspelt key", REFUSED, "SOLVER.MAX_ITR", provoke.option("SOLVER.MAX_ITR=3")),
        (
            "a misspelt key, lazy",
            REFUSED,
            "train.max_itr",
            provoke.option("train.max_itr=3", kind="py"),
        ),
        (
            "a yaml key on a lazy config",
            REFUSED,
            "SOLVER.WEIGHT_DECAY",
            provoke.option("SOLVER.WEIGHT_DECAY=0.1", kind="py"),
        ),
        ("text for a number", REFUSED, "MAX_ITER", provoke.option("SOLVER.MAX_ITER=many")),
        (
            "`CHECKPOINT_PERIOD=0`",
            REFUSED,
            "CHECKPOINT_PERIOD is 0",
            provoke.option("SOLVER.CHECKPOINT_PERIOD=0"),
        ),
        ("`LOG_PERIOD=0`", REFUSED, "LOG_PERIOD is 0", provoke.option("LOG_PERIOD=0")),
        (
            "negative workers",
            REFUSED,
            "NUM_WORKERS is -1",
            provoke.option("DATALOADER.NUM_WORKERS=-1"),
        ),
        ("a huge seed", REFUSED, "SEED is", provoke.option("SEED=99999999999")),
        (
            "no image in a batch",
            REFUSED,
            "IMS_PER_BATCH is 0",
            provoke.option("SOLVER.IMS_PER_BATCH=0"),
        ),
        ("negative iterations", REFUSED, "MAX_ITER is -1", provoke.option("SOLVER.MAX_ITER=-1")),
        ("negative decay", REFUSED, "WEIGHT_DECAY is", provoke.option("SOLVER.WEIGHT_DECAY=-1")),
        ("two means", REFUSED, "PIXEL_MEAN.*3 numbers", provoke.option("MODEL.PIXEL_MEAN=[1,2]")),
        (
            "anchors for two levels",
            REFUSED,
            "ANCHOR_GENERATOR",
            provoke.option("MODEL.ANCHOR_GENERATOR.SIZES=[[8],[16]]"),
        ),
        ("an unknown norm", REFUSED, "NORM", provoke.option("MODEL.FPN.NORM=XX")),
        ("an unknown device", REFUSED, "device 'gpu'", provoke.option("MODEL.DEVICE=gpu")),
        ("`cuda:9`", REFUSED, "MODEL.DEVICE|GPU", provoke.option("MODEL.DEVICE=cuda:9")),
        (
            "`--num-gpus 1` without a GPU",
            "refused, naming the option",
            "--num-gpus 1",
            provoke.option("--num-gpus", "1"),
        ),
        ("spaces around `=`", REFUSED, "write it as", provoke.option("SEED=", "3")),
        (
            "a bad interpolation, lazy",
            REFUSED,
            "train.max_iter",
            provoke.option("train.max_iter=${train.nothing}", kind="py"),
        ),
        (
            "a class that is not there, lazy",
            REFUSED,
            "model._target_",
            provoke.option("+model._target_=detectron2.modeling.NoSuch", kind="py"),
        ),
        (
            "code in a yaml config",
            "refused, nothing runs",
            "runs? no code|python/object",
            provoke.code_in_yaml,
        ),
        ("an unknown data set", REFUSED, "fewer", provoke.option("DATASETS.TRAIN=fewer")),
        (
            "no config",
            "refused",
            "does not exist|no such",
            lambda scene: scene.outcome_of(["--config-file", "none.yaml"]),
        ),
    ],
    "Annotations": [
        ("no JSON", NAMED, "few.json", provoke.text("{")),
        ("no list of images", NAMED, "few.json has no list", provoke.text("{}")),
        (
            "boxes as two corners",
            CAUSE,
            r"\[x0, y0, x1, y1\]",
            provoke.annotation(provoke.swap_box),
        ),
        ("polygons in fractions", CAUSE, "within 0..1", provoke.annotation(provoke.fractions)),
        (
            "every annotation twice",
            CAUSE,
            "twice|copies",
            lambda scene: scene.with_data(provoke.twice),
        ),
        (
            "a file listed twice",
            CAUSE,
            "twice",
            lambda scene: scene.with_data(provoke.listed_twice),
        ),
        (
            "an unknown category",
            "refused, naming the annotation",
            "category_id 99",
            provoke.first(category_id=99),
        ),
        (
            "an unknown image",
            "refused, naming the annotation",
            "image_id 99",
            provoke.first(image_id=99),
        ),
        (
            "a box with NaN",
            "refused, naming the annotation",
            "annotation 1 .*nan",
            provoke.first(bbox=[1, float("nan"), 8, 6]),
        ),
        (
            "a coordinate of 1e9",
            "refused, naming the annotation",
            "annotation 1 ",
            provoke.first(segmentation=[[1, 1, 1e9, 1, 9, 7]]),
        ),
        (
            "a bool in a polygon",
            "refused, naming the annotation",
            "annotation 1 ",
            provoke.first(segmentation=[[1, True, 9, 1, 9, 7]]),
        ),
        (
            "an empty segmentation",
            "refused, naming the annotation",
            "annotation 1 ",
            provoke.first(segmentation=[]),
        ),
        (
            "no objects at all",
            "refused",
            "no image has a usable annotation",
            lambda scene: scene.with_data(provoke.without_objects),
        ),
    ],
    "Images": [
        ("a file is gone", NAMED, "00002.png", provoke.picture(provoke.gone)),
        ("a file cut off", NAMED, "image 0000", provoke.picture(provoke.cut)),
        ("a page of HTML instead", NAMED, "image 0000", provoke.picture(provoke.renamed_html)),
        ("12 bits in 16", CAUSE, "below 4096", provoke.picture(provoke.twelve_bits)),
        ("another size than annotated", NAMED, "50|40", provoke.picture(provoke.other_size)),
    ],
    "Prediction": [
        ("a path instead of an array", "predicts", "as from the array", provoke.predicted("path")),
        ("a PIL image", "predicts", "as from the array", provoke.predicted("PIL")),
        ("a list of paths", "predicts", "as from the array", provoke.predicted("list")),
        ("a path that is not there", NAMED, "no_such_photo.jpg", provoke.missing_image),
        ("a number", "refused", "not int", provoke.predicted(5)),
    ],
}
