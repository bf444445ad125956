"""Weights, classes and config belong together: what is compared, told and refused."""

import logging
import os

import pytest
from omegaconf import OmegaConf

from d2ext.checkpoint import Checkpointer, read_metadata
from d2ext.engine import Predictor, build_experiment, train
from d2ext.engine.loop import evaluate_checkpoint
from d2ext.engine.provenance import (
    CONFIG_KEY,
    class_difference,
    config_to_store,
    setting_differences,
)
from d2ext.errors import UserError

from tests.engine.helpers import CONFIGS

ANCHORS = {
    "yaml": "MODEL.ANCHOR_GENERATOR.SIZES=[[12],[24],[48],[96],[192]]",
    "py": "model.proposal_generator.anchor_generator.sizes=[[12],[24],[48],[96],[192]]",
}
SCORES = {
    "yaml": "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.3",
    "py": "model.roi_heads.box_predictor.test_score_thresh=0.3",
}
TRAINED_WITH = {
    "yaml": "MODEL.RPN.POSITIVE_FRACTION=0.4",
    "py": "model.proposal_generator.positive_fraction=0.4",
}


@pytest.fixture
def saved(short_run, tmp_path):
    """Function: (kind, class names, overrides) -> path of weights with what a training stores."""

    def save(kind, names=None, *more):
        experiment = short_run("mask_rcnn", kind, "trained", *more)
        metadata = {**experiment.metadata(), CONFIG_KEY: config_to_store(experiment)}
        if names is not None:
            metadata["thing_classes"] = names
        model = experiment.build_model()
        Checkpointer(model, str(tmp_path / "trained"), metadata=metadata).save("model")
        return str(tmp_path / "trained/model.pth")

    return save


def shapes_classes(short_run):
    return short_run("mask_rcnn", "yaml", "any").metadata()["thing_classes"]


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_training_stores_classes_and_config_and_resuming_compares(
    short_run, saved, tmp_path, kind
):
    train(short_run("mask_rcnn", kind, "run", "train.max_iter=2"))
    final = str(tmp_path / "run/model_final.pth")
    stored = read_metadata(final)
    assert stored["thing_classes"] == shapes_classes(short_run)
    assert stored[CONFIG_KEY] == (tmp_path / "run/config.yaml").read_text()
    again = short_run("mask_rcnn", kind, "run", "train.max_iter=2")
    assert setting_differences(again, stored, final) == []

    other = short_run("mask_rcnn", kind, "run", "train.max_iter=4", ANCHORS[kind])
    other.chosen = frozenset()  # as if the config said so
    with pytest.raises(UserError, match=r"other settings: .*(?i:sizes) was \[.*; take the config"):
        train(other, resume=True)
    stored["thing_classes"] = stored["thing_classes"][::-1]
    Checkpointer(again.build_model(), str(tmp_path / "other"), metadata=stored).save("model")
    with pytest.raises(UserError, match="classes in another order: number 0 is '.*' there"):
        evaluate_checkpoint(
            short_run("mask_rcnn", kind, "o", f"MODEL.WEIGHTS={tmp_path / 'other/model.pth'}")
        )


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_settings_that_weights_are_bound_to_are_refused_unless_the_user_sets_them(
    short_run, saved, caplog, kind, use
):
    path = saved(kind)

    def apply(experiment):
        evaluate_checkpoint(experiment) if use == "evaluate" else Predictor(experiment, path)

    weights = f"MODEL.WEIGHTS={path}"
    apply(short_run("mask_rcnn", kind, "e", weights))
    differing = short_run("mask_rcnn", kind, "e", weights, ANCHORS[kind])
    differing.chosen = frozenset()
    with pytest.raises(UserError, match="was trained with other settings: .*set these keys"):
        apply(differing)
    caplog.clear()
    apply(short_run("mask_rcnn", kind, "e", weights, ANCHORS[kind]))
    assert sum("not as in the training" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_other_thresholds_are_told_with_both_values_and_settings_of_the_training_are_not(
    short_run, saved, caplog, kind
):
    path = saved(kind)
    caplog.set_level(logging.WARNING)
    experiment = short_run("mask_rcnn", kind, "e", SCORES[kind], TRAINED_WITH[kind])
    caplog.clear()
    Predictor(experiment, path)
    (line,) = [r.getMessage() for r in caplog.records if "not as in" in r.getMessage()]
    key = SCORES[kind].split("=")[0]
    assert path in line and line.endswith(f"{key} was 0.001 and is 0.3")


@pytest.mark.parametrize("kind, other", [("yaml", "py"), ("py", "yaml")])
def test_a_yaml_and_a_lazy_config_are_compared_by_what_has_a_name_in_both(
    short_run, saved, kind, other
):
    path = saved(kind)
    stored = read_metadata(path)
    assert setting_differences(short_run("mask_rcnn", other, "e"), stored, path) == []
    experiment = short_run("mask_rcnn", other, "e", ANCHORS[other], SCORES[other])
    assert [key for key, *_ in setting_differences(experiment, stored, path)] == [
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    ]


def test_classes_of_other_names_need_a_word_and_another_number_is_refused(short_run, saved, caplog):
    names = shapes_classes(short_run)
    path = saved("yaml", [f"my {name}" for name in names])
    experiment = short_run("mask_rcnn", "yaml", "e", f"MODEL.WEIGHTS={path}")
    with pytest.raises(UserError, match=f"number 0 is 'my {names[0]}' there.*--rename-classes"):
        evaluate_checkpoint(experiment)
    experiment.rename_classes = True
    evaluate_checkpoint(experiment)
    path = saved("yaml", ["cat", "dog"])
    with pytest.raises(UserError, match=r"2 classes \('cat', 'dog'\), not 8 \('disk', .*\.\.\.\)"):
        evaluate_checkpoint(short_run("mask_rcnn", "yaml", "e", f"MODEL.WEIGHTS={path}"))


def test_a_training_may_start_from_weights_of_other_classes_and_says_so(short_run, saved, caplog):
    names = shapes_classes(short_run)
    path = saved("yaml", names[::-1])
    train(short_run("mask_rcnn", "yaml", "run", f"MODEL.WEIGHTS={path}", "SOLVER.MAX_ITER=1"))
    (line,) = [r.getMessage() for r in caplog.records if "was trained on" in r.getMessage()]
    assert "classes in another order" in line and path in line


def test_checkpoints_without_a_config_load_as_they_did(short_run, tmp_path):
    experiment = short_run("mask_rcnn", "yaml", "e", ANCHORS["yaml"])
    Checkpointer(experiment.build_model(), str(tmp_path)).save("bare")
    experiment.chosen = frozenset()
    Predictor(experiment, str(tmp_path / "bare.pth"))


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        ("ab", "ab", ""),
        ("ab", "ba", "classes in another order: number 0 is 'a' there and 'b' here"),
        ("ac", "ab", "classes: number 1 is 'c' there and 'b' here"),
        ("abcd", "a", "4 classes ('a', 'b', 'c', ...), not 1 ('a')"),
    ],
)
def test_difference_of_classes_in_words(theirs, ours, words):
    assert class_difference(theirs, ours) == words


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_paths_in_a_saved_config_are_absolute(register_few, tmp_path, monkeypatch, kind):
    name, _, paths = register_few.partition("=")
    images = os.path.dirname(paths.split(",")[0])
    monkeypatch.chdir(images)
    path = f"{CONFIGS['mask_rcnn']}.{kind}"
    overrides = ["DATASETS.TRAIN=rel_few", "DATASETS.TEST=rel_few", "OUTPUT_DIR=out"]
    overrides += ["MODEL.WEIGHTS=w.pth", "MODEL.DEVICE=cpu"]
    experiment = build_experiment(path, overrides, ["rel_few=few.json,images"])
    (tmp_path / "config.yaml").write_text(config_to_store(experiment))
    assert experiment.output_dir == "out"  # the run itself keeps its words
    monkeypatch.chdir(tmp_path)
    again = build_experiment("config.yaml")
    assert again.output_dir == os.path.join(images, "out")
    assert again.init_checkpoint == os.path.join(images, "w.pth")
    assert again.registered() == [f"rel_few={images}/few.json,{images}/images"]
    shipped = build_experiment(path, ["MODEL.DEVICE=cpu"], with_data=False)
    assert f"{shipped.init_checkpoint}\n" in config_to_store(shipped)
    assert shipped.init_checkpoint.startswith("d2ext://")


def test_an_evaluation_does_without_the_training_data(short_run, saved, register_few, tmp_path):
    path = saved("yaml")
    gone = f"gone_set={tmp_path}/gone.json,{tmp_path}"
    config = tmp_path / "config.yaml"
    stored = read_metadata(path)[CONFIG_KEY].replace("REGISTER: []", f"REGISTER: ['{gone}']")
    config.write_text(stored)
    assert gone in stored
    overrides = ["DATASETS.TRAIN=gone_set", "DATASETS.TEST=demo_few", f"MODEL.WEIGHTS={path}"]
    with pytest.raises(UserError, match="gone.json"):
        build_experiment(str(config), overrides, [register_few])
    experiment = build_experiment(str(config), overrides, [register_few], eval_only=True)
    assert "bbox" in evaluate_checkpoint(experiment)
    predictor = Predictor(str(config), path)  # neither needs prediction
    assert predictor.class_names[0] == "disk"


def test_settings_that_loading_sets_are_no_difference(short_run, saved):
    path = saved("py", None, "model.pixel_mean=[1.0,2.0,3.0]")
    stored = read_metadata(path)
    experiment = short_run("mask_rcnn", "py", "e")
    assert [k for k, *_ in setting_differences(experiment, stored, path)] == ["model.pixel_mean"]
    stored["settings"] = {"pixel_mean": [1.0, 2.0, 3.0]}
    assert setting_differences(experiment, stored, path) == []
    assert OmegaConf.to_container(experiment.cfg.model.pixel_mean) != [1.0, 2.0, 3.0]
