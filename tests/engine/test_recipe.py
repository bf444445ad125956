"""Recipes: their numbers come from the data when a training starts, and stay those of the run."""

import copy
import logging
from pathlib import Path

import pytest

from d2ext.checkpoint import read_metadata
from d2ext.config import load_config
from d2ext.engine import Predictor, build_experiment, train
from d2ext.engine.loop import evaluate_checkpoint
from d2ext.engine.recipe import (
    fit_recipe,
    is_recipe,
    read_statistics,
    recall_recipe,
    take_options,
)
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.engine.test_cli import run_main

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {name: f"projects/{name.upper()}/configs" for name in ("fcis", "htc", "mnc")}
NETWORKS = ("mask_rcnn", "cascade_mask_rcnn", *FOLDERS)
STEMS = [
    str(ROOT / FOLDERS.get(name, "configs") / f"{name}_{size}_finetune")
    for name in NETWORKS
    for size in ("tiny", "R_50")
]
TINY = [stem for stem in STEMS if "tiny" in stem]
MASK_RCNN = str(ROOT / "configs/mask_rcnn_tiny_finetune")
KINDS = ("yaml", "py")


def recipe(stem, kind, dataset, *more, **options):
    sets = [f"DATASETS.TRAIN={dataset}", f"DATASETS.TEST={dataset}", "MODEL.DEVICE=cpu"]
    experiment = build_experiment(f"{stem}.{kind}", [*sets, *more])
    take_options(experiment, options)
    return experiment


def short(kind, dataset, folder, *more, **options):
    """A training of seconds, without weights, on images of 64 pixels."""
    norm = "MODEL.RESNETS.NORM=GN" if kind == "yaml" else "model.backbone.norm=GN"
    options = {"epochs": 0.5, "image_size": 64, **options}
    more = ("MODEL.WEIGHTS=''", norm, f"OUTPUT_DIR={folder}", *more)
    return recipe(MASK_RCNN, kind, dataset, *more, **options)


@pytest.fixture
def three(shapes_few):
    """Name of a set of three images."""
    records = [r for r in DatasetCatalog.get(shapes_few) if r["annotations"]][:3]
    classes = MetadataCatalog.get(shapes_few).thing_classes
    DatasetCatalog.register("three", lambda: copy.deepcopy(records))
    MetadataCatalog.get("three").set(evaluator_type="coco", thing_classes=classes)
    return "three"


def applied(experiment):
    return experiment.setting("RECIPE.APPLIED", "recipe.applied")


@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: Path(stem).name)
def test_both_kinds_of_config_get_the_same_numbers(shapes_few, stem):
    experiments = [recipe(stem, kind, shapes_few) for kind in KINDS]
    first, second = (fit_recipe(experiment) for experiment in experiments)
    assert first == second and len(first) > 10
    assert applied(experiments[0]) == applied(experiments[1])
    assert not any(is_recipe(experiment) for experiment in experiments)
    assert fit_recipe(experiments[0]) == []  # an ordinary config now
    for experiment in experiments:
        assert experiment.max_iter == int(
            dict(text.split("=", 1) for text in applied(experiment))["SOLVER.MAX_ITER"]
        )


@pytest.mark.parametrize("stem", TINY, ids=lambda stem: Path(stem).name)
def test_every_tiny_recipe_trains(shapes_few, tmp_path, stem):
    more = ("SOLVER.MAX_ITER=2", f"OUTPUT_DIR={tmp_path}", "DATASETS.TEST=[]")
    train(recipe(stem, "yaml", shapes_few, *more, image_size=64))
    assert (tmp_path / "model_final.pth").is_file()


def test_what_the_command_line_sets_stays_and_other_rules_follow_it(shapes_few):
    e = recipe(MASK_RCNN, "py", shapes_few, "SOLVER.IMS_PER_BATCH=8", "train.max_iter=70")
    keys = [choice.key for choice in fit_recipe(e)]
    assert not {"SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER"} & set(keys)
    assert (e.cfg.optimizer.lr, e.cfg.lr_multiplier.warmup_iters, e.eval_period) == (0.004, 7, 7)


def test_options_take_the_place_of_rules(shapes_few):
    e = recipe(MASK_RCNN, "yaml", shapes_few, epochs=3.0, image_size=96, batch_size=5)
    count = read_statistics([shapes_few]).num_images
    fit_recipe(e)
    assert (e.cfg.SOLVER.IMS_PER_BATCH, e.cfg.SOLVER.BASE_LR) == (5, 0.0025)
    assert e.max_iter == -(-3 * count // 5) and e.cfg.INPUT.MIN_SIZE_TEST == 96
    assert (e.cfg.RECIPE.EPOCHS, e.cfg.RECIPE.IMAGE_SIZE, e.cfg.RECIPE.BATCH) == (3.0, 96, 5)


def test_statistics_leave_out_crowds_and_images_without_objects(shapes_few):
    records = DatasetCatalog.get(shapes_few)
    objects = [[a for a in r["annotations"] if not a["iscrowd"]] for r in records]
    data = read_statistics([shapes_few])
    assert data.num_images == sum(map(bool, objects)) < len(records)
    assert len(data.boxes) == sum(map(len, objects)) < sum(len(r["annotations"]) for r in records)
    first = next(a["bbox"] for own in objects for a in own)  # x, y, width, height
    assert data.boxes[0].tolist() == [first[3], first[2]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_its_numbers_when_the_data_have_changed(three, tmp_path, kind):
    started = short(kind, three, tmp_path)
    train(started)
    path = str(tmp_path / "model_final.pth")
    names = ("SOLVER.BASE_LR", "INPUT.MIN_SIZE_TEST", "MODEL.ANCHOR_GENERATOR.SIZES")
    known = dict(text.split("=", 1) for text in applied(started))
    assert set(names) <= set(known)

    changed = DatasetCatalog.get(three)
    for record in changed:
        for annotation in record["annotations"]:
            annotation["bbox"][2:] = [5.0, 5.0]
    DatasetCatalog.remove(three)
    DatasetCatalog.register(three, lambda: changed)

    resumed = short(kind, three, tmp_path, "SOLVER.MAX_ITER=4")
    train(resumed, resume=True)
    kept = dict(text.split("=", 1) for text in applied(resumed))
    assert kept == {k: v for k, v in known.items() if k != "SOLVER.MAX_ITER"}

    other = KINDS[1 - KINDS.index(kind)]  # a config of the other kind knows them as well
    predictor = Predictor(f"{MASK_RCNN}.{other}", path)
    assert applied(predictor.experiment)[0] == "INPUT.MIN_SIZE_TEST=64"
    evaluated = short(kind, three, tmp_path, "MODEL.WEIGHTS=" + path)
    evaluate_checkpoint(evaluated)
    assert not is_recipe(evaluated)
    stored = load_config(str(tmp_path / "inference/config.yaml"))
    assert "64" in str(stored)


def test_a_run_refuses_other_options_when_it_is_continued(three, tmp_path):
    train(short("yaml", three, tmp_path))
    stored = read_metadata(str(tmp_path / "model_final.pth"))
    same = short("yaml", three, tmp_path)
    recall_recipe(same, stored, "file.pth")
    assert len(applied(same)) > 5
    with pytest.raises(UserError, match="--epochs is 7, but 'file.pth' was trained with 0.5"):
        recall_recipe(short("yaml", three, tmp_path, epochs=7.0), stored, "file.pth")


def test_weights_of_no_recipe_leave_the_config_as_it_is(shapes_few, caplog):
    experiment = recipe(MASK_RCNN, "yaml", shapes_few)
    with caplog.at_level(logging.INFO):
        recall_recipe(experiment, {}, "other.pth")
    assert "no numbers in 'other.pth'" in caplog.text
    assert experiment.max_iter == 400 and applied(experiment) == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": 3.0}, "--epochs is for recipes; set SOLVER.MAX_ITER"),
        ({"image_size": 3}, "set INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST"),
        ({"batch_size": 3}, "set SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR"),
    ],
)
def test_options_are_for_recipes(shapes_few, options, words):
    experiment = build_experiment(str(ROOT / "configs/mask_rcnn_tiny.yaml"))
    with pytest.raises(UserError, match=words):
        take_options(experiment, options)


def test_options_of_the_command_line_end_in_one_line(capsys):
    assert run_main("--config-file", f"{ROOT}/configs/mask_rcnn_tiny.py", "--epochs", "3") == 1
    assert "train.max_iter, or take a config *_finetune" in capsys.readouterr().err
    assert run_main("--config-file", f"{MASK_RCNN}.py", "--batch-size", "0") == 1
    assert capsys.readouterr().err == "error: --batch-size is 0; it has to be above 0\n"


def test_registered_sets_are_used_in_their_order(register_argument):
    texts = [register_argument, register_argument.replace("few=", "other=")]
    for register, only, train_sets, test_sets in [
        (texts, False, ["few"], ["other"]),
        (texts[:1], False, ["few"], []),
        (texts[:1], True, ["few"], ["few"]),
    ]:
        e = build_experiment(f"{MASK_RCNN}.py", [], register, eval_only=only)
        assert (e.train_sets(), e.test_sets()) == (train_sets, test_sets)
    named = build_experiment(f"{MASK_RCNN}.yaml", ["DATASETS.TEST=few"], texts)
    assert (named.train_sets(), named.test_sets()) == (["few"], ["few"])
    third = register_argument.replace("few=", "third=")
    with pytest.raises(UserError, match="--register is given 3 times"):
        build_experiment(f"{MASK_RCNN}.yaml", [], [*texts, third])
