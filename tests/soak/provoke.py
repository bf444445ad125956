"""How each fault of `faults.FAULTS` is brought about: functions of a `Scene` that return what was
seen, and functions that make such functions."""

import contextlib
import os
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
