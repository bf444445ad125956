"""What can go wrong, by whose hand ever, and what has to come of it: the table of
`docs/reliability.md`.

A fault is `(what, what has to happen, words of the outcome, function of a Scene)`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from PIL import Image

from d2ext.checkpoint import checkpointer
from d2ext.engine.resuming import find_last_checkpoint

from tests.engine.helpers import calling

REFUSED = "refused, naming the key"
NAMED = "refused, naming the file"
CAUSE = "refused, naming the likely cause"


def option(*options, kind="yaml"):
    """A command with a wrong option."""
    return lambda scene: scene.command(*options, kind=kind)


def annotation(change):
    """A training on data in which every annotation was changed."""

    def change_all(content, images):
        for entry in content["annotations"]:
            change(entry)

    return lambda scene: scene.with_data(change_all)


def first(**values):
    """A training on data in which the first annotation was changed."""

    def change(content, images):
        content["annotations"][0].update(values)

    return lambda scene: scene.with_data(change)


def picture(change):
    """A training on data of which the first picture was changed."""

    def change_first(content, images):
        change(images / content["images"][0]["file_name"], content)

    return lambda scene: scene.with_data(change_first)


def text(content):
    """A training on a file of another content."""
    return lambda scene: scene.with_data(lambda data, images: content)


def flipped(path, place=0.5, bit=16):
    """Flip a bit of a file."""
    content = bytearray(Path(path).read_bytes())
    content[int(len(content) * place)] ^= bit
    Path(path).write_bytes(content)


def cut(path, content=None):
    """Cut the end of a file off."""
    Path(path).write_bytes(Path(path).read_bytes()[:-300])


def swap_box(entry):
    x, y, w, h = entry["bbox"]
    entry["bbox"] = [x, y, x + w, y + h]


def fractions(entry):
    x, y, w, h = entry["bbox"]
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    entry["segmentation"] = [[v / 200 for v in corners]]


def twice(content, images):
    number = max(a["id"] for a in content["annotations"])
    copies = [{**a, "id": number + a["id"]} for a in content["annotations"]]
    content["annotations"] += copies


def listed_twice(content, images):
    content["images"].append({**content["images"][0], "id": 999})


def gone(path, content):
    path.unlink()


def renamed_html(path, content):
    path.write_text("<html>not found</html>")


def twelve_bits(path, content):
    image = cv2.imread(str(path)).astype(np.uint16) * 16
    cv2.imwrite(str(path), image)


def other_size(path, content):
    Image.open(path).resize((50, 40)).save(path)


# Runs


def again(scene):
    scene.train()
    return scene.command()


def overwritten(scene):
    scene.train()
    scene.train(overwrite=True)
    return f"exit 0, {len(list((scene.folder / 'run.1').glob('model_*.pth')))} checkpoints moved"


def second_training(scene):
    code = (
        "import sys, time; from d2ext.engine.folder import training_folder\n"
        "with training_folder(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
    )
    folder = scene.folder / "run"
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        outcome = scene.command()
        other.kill()
    return outcome


def after_a_killed_training(scene):
    second_training(scene)
    return scene.command()


def interrupted(number):
    """A signal in the middle of a run, which is then resumed."""

    def provoke(scene):
        experiment = calling(scene.experiment(), {3: lambda: os.kill(os.getpid(), number)})
        from d2ext.engine import train

        try:
            train(experiment)
        except SystemExit as end:
            saved = (scene.folder / "run/last_checkpoint").read_text()
            code = end.code
        return f"exit {code}, {saved} saved; {resumed(scene)}"

    return provoke


def resumed(scene):
    """Resume a run, compare it with one without interruption."""
    scene.train(resume=True)
    weights = torch.load(scene.folder / "run/model_final.pth")["model"]
    os.rename(scene.folder / "run", scene.folder / "other")
    scene.train()
    straight = torch.load(scene.folder / "run/model_final.pth")["model"]
    same = all(torch.equal(weights[key], straight[key]) for key in straight)
    return "resumed to the same weights" if same else "resumed to OTHER weights"


def damaged_last(damage):
    """The newest checkpoints are damaged, and the run is resumed."""

    def provoke(scene):
        scene.train()
        for name in ("model_final.pth", "model_0000005.pth"):
            damage(scene.folder / "run" / name)
        path, iteration = find_last_checkpoint(str(scene.folder / "run"))
        return f"continued from {Path(path).name}; {resumed(scene)}"

    return provoke


def without_final(scene):
    scene.train()
    (scene.folder / "run/model_final.pth").unlink()
    (scene.folder / "run/last_checkpoint").write_text("model_0000005.pth")
    return resumed(scene)


def full_disk(scene):
    failures = [OSError(28, "No space left on device")]
    save = torch.save

    def fail_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return save(*args, **kwargs)

    with mock.patch.object(checkpointer.torch, "save", fail_once):
        outcome = scene.command()
    names = sorted(p.name for p in (scene.folder / "run").glob("model_*.pth"))
    return f"{outcome}, saved {', '.join(names)}"


def folder_not_writable(scene):
    (scene.folder / "run").write_text("a file")
    return scene.command()


def failed_command(scene):
    scene.train()
    before = (scene.folder / "run/config.yaml").read_bytes()
    outcome = scene.command("--resume", "MODEL.FPN.OUT_CHANNELS=32")
    same = (scene.folder / "run/config.yaml").read_bytes() == before
    return f"{outcome}; config.yaml {'as before' if same else 'CHANGED'}"


def nan_loss(scene):
    def poison(batch):
        batch[0]["image"] = batch[0]["image"].float() * float("nan")

    experiment = scene.experiment()
    build = experiment.build_train_loader

    def build_poisoned(start_iter=0):
        for number, batch in enumerate(build(start_iter)):
            if number == 2:
                poison(batch)
            yield batch

    experiment.build_train_loader = build_poisoned
    from d2ext.engine import train

    return scene.outcome(lambda: train(experiment))


def other_classes(scene):
    scene.train()

    def rename(content, images):
        for category in content["categories"]:
            category["name"] = f"other {category['name']}"

    return scene.with_data(rename, "--resume")


# Checkpoints


def weights_changed(change, *more):
    """An evaluation of changed weights."""

    def provoke(scene):
        path = scene.folder / "model.pth"
        path.write_bytes(Path(scene.weights).read_bytes())
        change(path)
        test = ["DATASETS.TEST=few", f"MODEL.WEIGHTS={path}"]
        return scene.command("--eval-only", *test, *more)

    return provoke


def evaluated(path, *more):
    """An evaluation of a file of another name."""
    return lambda scene: scene.command(
        "--eval-only", "DATASETS.TEST=few", f"MODEL.WEIGHTS={path}", *more
    )


def reversed_ids(scene):
    scene.train()

    def reverse(content, images):
        names = [c["name"] for c in content["categories"]]
        for category, name in zip(content["categories"], reversed(names)):
            category["name"] = name

    test = ["DATASETS.TEST=few", f"MODEL.WEIGHTS={scene.folder / 'run/model_final.pth'}"]
    return scene.with_data(reverse, "--eval-only", *test)


def other_pixels(scene):
    scene.train()
    path = scene.folder / "own.yaml"
    lines = [f"_BASE_: {os.path.abspath(scene.options()[1])}", "MODEL:", "  PIXEL_STD: [9, 9, 9]"]
    path.write_text("\n".join(lines))
    test = ["DATASETS.TEST=few", f"MODEL.WEIGHTS={scene.folder / 'run/model_final.pth'}"]
    options = scene.options("--eval-only", *test)
    return scene.outcome_of([options[0], str(path), *options[2:]])


def hostile_pickle(path):
    path.write_bytes(b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.")


def program_in_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        program = b"cos\nsystem\nX\x11\0\0\0touch /tmp/hacked\x85R."
        archive.writestr("x/data.pkl", b"\x80\x02}X\x05\0\0\0model" + program[:-1] + b"s.")
        archive.writestr("x/version", "3")


def code_in_yaml(scene):
    path = scene.folder / "own.yaml"
    path.write_text("SEED: !!python/object/apply:os.system ['touch executed']\n")
    options = scene.options()
    return scene.outcome_of([options[0], str(path), *options[2:]])


# Prediction


def predicted(image):
    """The predictor with something else than an array."""

    def provoke(scene):
        path = str(sorted((scene.source / "images").iterdir())[0])
        given = {"path": path, "PIL": Image.open(path), "list": [path, path]}.get(image, image)
        plain = scene.predictor()(cv2.imread(path))["instances"]

        def predict():
            found = scene.predictor()(given)
            found = found[0] if isinstance(found, list) else found
            same = torch.equal(found["instances"].scores, plain.scores)
            return "predicts as from the array" if same else "predicts OTHERWISE"

        return scene.outcome(predict)

    return provoke


def without_objects(content, images):
    content["annotations"].clear()


def missing_image(scene):
    with contextlib.suppress(FileNotFoundError):
        return scene.outcome(lambda: scene.predictor()("no_such_photo.jpg"))


FAULTS = {
    "Runs": [
        ("training again in a used folder", "refused", "already has a run", again),
        (
            "the same with `--overwrite`",
            "the old run is moved",
            "3 checkpoints|checkpoints moved",
            overwritten,
        ),
        ("two trainings in one folder", "the second is refused", "is training in", second_training),
        ("a training after one that was killed", "runs", "^exit 0", after_a_killed_training),
        (
            "Ctrl-C in the middle",
            "saves, resumes exactly",
            "exit 130, .*same weights",
            interrupted(signal.SIGINT),
        ),
        (
            "SIGTERM in the middle",
            "saves, resumes exactly",
            "exit 130, .*same weights",
            interrupted(signal.SIGTERM),
        ),
        (
            "the newest checkpoints are cut off",
            "continued from the newest good one",
            "model_0000003.pth; .*same weights",
            damaged_last(cut),
        ),
        (
            "a bit of the newest checkpoints has flipped",
            "continued from the newest good one",
            "model_0000003.pth; .*same weights",
            damaged_last(flipped),
        ),
        (
            "the newest checkpoints are gone",
            "continued from the newest good one",
            "model_0000003.pth; .*same weights",
            damaged_last(lambda path: path.unlink()),
        ),
        ("killed before `model_final.pth`", "resuming completes it", "same weights", without_final),
        (
            "disk full at a save",
            "goes on, saves at the next period",
            "^exit 0, saved model_0000003",
            full_disk,
        ),
        ("the output folder is a file", REFUSED, "OUTPUT_DIR", folder_not_writable),
        ("a command that fails in a used folder", "its config stays", "as before", failed_command),
        ("NaN in a batch", "images, losses, rate, advice", "images .*learning rate", nan_loss),
        (
            "resuming with other classes",
            "refused, naming both",
            "other disk|classes",
            other_classes,
        ),
    ],
    "Weights": [
        ("a flipped bit", NAMED, "model.pth.*checksum", weights_changed(flipped)),
        ("a file cut off", NAMED, "model.pth.*cannot be read", weights_changed(cut)),
        ("an empty file", NAMED, "model.pth", weights_changed(lambda p: p.write_bytes(b""))),
        (
            "a page of HTML instead",
            NAMED,
            "model.pth",
            weights_changed(lambda p: p.write_text("<html>")),
        ),
        (
            "a key that takes for ever to hash",
            NAMED,
            "no text and no number",
            weights_changed(hostile_pickle),
        ),
        ("a program in the archive", NAMED, "model.pth", weights_changed(program_in_archive)),
        ("no such file", NAMED, "nowhere.pth.*does not exist", evaluated("nowhere.pth")),
        (
            "an address that is not there",
            NAMED,
            "cannot download",
            evaluated("https://127.0.0.1:9/model.pth"),
        ),
        (
            "weights of another network",
            "refused",
            "lacks|fit",
            weights_changed(lambda p: None, "MODEL.FPN.OUT_CHANNELS=32"),
        ),
        ("categories in reverse order", "refused, naming both", "order", reversed_ids),
        (
            "another standard deviation than in the training",
            "refused, both values",
            "PIXEL_STD was",
            other_pixels,
        ),
    ],
    "Settings": [
        ("a misspelt key", REFUSED, "SOLVER.MAX_ITR", option("SOLVER.MAX_ITR=3")),
        ("a misspelt key, lazy", REFUSED, "train.max_itr", option("train.max_itr=3", kind="py")),
        (
            "a yaml key on a lazy config",
            REFUSED,
            "SOLVER.WEIGHT_DECAY",
            option("SOLVER.WEIGHT_DECAY=0.1", kind="py"),
        ),
        ("text for a number", REFUSED, "MAX_ITER", option("SOLVER.MAX_ITER=many")),
        (
            "`CHECKPOINT_PERIOD=0`",
            REFUSED,
            "CHECKPOINT_PERIOD is 0",
            option("SOLVER.CHECKPOINT_PERIOD=0"),
        ),
        ("`LOG_PERIOD=0`", REFUSED, "LOG_PERIOD is 0", option("LOG_PERIOD=0")),
        ("negative workers", REFUSED, "NUM_WORKERS is -1", option("DATALOADER.NUM_WORKERS=-1")),
        ("a huge seed", REFUSED, "SEED is", option("SEED=99999999999")),
        ("no image in a batch", REFUSED, "IMS_PER_BATCH is 0", option("SOLVER.IMS_PER_BATCH=0")),
        ("negative iterations", REFUSED, "MAX_ITER is -1", option("SOLVER.MAX_ITER=-1")),
        ("negative decay", REFUSED, "WEIGHT_DECAY is", option("SOLVER.WEIGHT_DECAY=-1")),
        ("two means", REFUSED, "PIXEL_MEAN.*3 numbers", option("MODEL.PIXEL_MEAN=[1,2]")),
        (
            "anchors for two levels",
            REFUSED,
            "ANCHOR_GENERATOR",
            option("MODEL.ANCHOR_GENERATOR.SIZES=[[8],[16]]"),
        ),
        ("an unknown norm", REFUSED, "NORM", option("MODEL.FPN.NORM=XX")),
        ("an unknown device", REFUSED, "device 'gpu'", option("MODEL.DEVICE=gpu")),
        ("`cuda:9`", REFUSED, "MODEL.DEVICE|GPU", option("MODEL.DEVICE=cuda:9")),
        (
            "`--num-gpus 1` without a GPU",
            "refused, naming the option",
            "--num-gpus 1",
            option("--num-gpus", "1"),
        ),
        ("spaces around `=`", REFUSED, "write it as", option("SEED=", "3")),
        (
            "a bad interpolation, lazy",
            REFUSED,
            "train.max_iter",
            option("train.max_iter=${train.nothing}", kind="py"),
        ),
        (
            "a class that is not there, lazy",
            REFUSED,
            "model._target_",
            option("+model._target_=detectron2.modeling.NoSuch", kind="py"),
        ),
        (
            "code in a yaml config",
            "refused, nothing runs",
            "runs? no code|python/object",
            code_in_yaml,
        ),
        ("an unknown data set", REFUSED, "fewer", option("DATASETS.TRAIN=fewer")),
        (
            "no config",
            "refused",
            "does not exist|no such",
            lambda scene: scene.outcome_of(["--config-file", "none.yaml"]),
        ),
    ],
    "Annotations": [
        ("no JSON", NAMED, "few.json", text("{")),
        ("no list of images", NAMED, "few.json has no list", text("{}")),
        ("boxes as two corners", CAUSE, r"\[x0, y0, x1, y1\]", annotation(swap_box)),
        ("polygons in fractions", CAUSE, "within 0..1", annotation(fractions)),
        ("every annotation twice", CAUSE, "twice|copies", lambda scene: scene.with_data(twice)),
        ("a file listed twice", CAUSE, "twice", lambda scene: scene.with_data(listed_twice)),
        (
            "an unknown category",
            "refused, naming the annotation",
            "category_id 99",
            first(category_id=99),
        ),
        ("an unknown image", "refused, naming the annotation", "image_id 99", first(image_id=99)),
        (
            "a box with NaN",
            "refused, naming the annotation",
            "annotation 1 .*nan",
            first(bbox=[1, float("nan"), 8, 6]),
        ),
        (
            "a coordinate of 1e9",
            "refused, naming the annotation",
            "annotation 1 ",
            first(segmentation=[[1, 1, 1e9, 1, 9, 7]]),
        ),
        (
            "a bool in a polygon",
            "refused, naming the annotation",
            "annotation 1 ",
            first(segmentation=[[1, True, 9, 1, 9, 7]]),
        ),
        (
            "an empty segmentation",
            "refused, naming the annotation",
            "annotation 1 ",
            first(segmentation=[]),
        ),
        (
            "no objects at all",
            "refused",
            "no image has a usable annotation",
            lambda scene: scene.with_data(without_objects),
        ),
    ],
    "Images": [
        ("a file is gone", NAMED, "00002.png", picture(gone)),
        ("a file cut off", NAMED, "image 0000", picture(cut)),
        ("a page of HTML instead", NAMED, "image 0000", picture(renamed_html)),
        ("12 bits in 16", CAUSE, "below 4096", picture(twelve_bits)),
        ("another size than annotated", NAMED, "50|40", picture(other_size)),
    ],
    "Prediction": [
        ("a path instead of an array", "predicts", "as from the array", predicted("path")),
        ("a PIL image", "predicts", "as from the array", predicted("PIL")),
        ("a list of paths", "predicts", "as from the array", predicted("list")),
        ("a path that is not there", NAMED, "no_such_photo.jpg", missing_image),
        ("a number", "refused", "number|image|int", predicted(5)),
    ],
}
