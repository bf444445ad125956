"""The command line: what it accepts, and one line for what it cannot do."""

import json

import pytest
import torch

from d2ext.engine import build_experiment, main
from d2ext.engine.cli import argument_parser, check_score, run_guarded
from d2ext.engine.setup import check_runnable
from d2ext.errors import UserError

from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.solver.build import get_default_optimizer_params

from tests.engine.helpers import CONFIGS


def run_main(*argv):
    """Exit status of `main`."""
    with pytest.raises(SystemExit) as exit_info:
        main(argv=[str(a) for a in argv])
    return exit_info.value.code


@pytest.fixture
def coco_file(tmp_path):
    """A COCO file of two classes and one image; returns its --register argument."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48), (90, 120, 30)).save(tmp_path / "images/a.jpg")
    box = [4, 4, 20, 20]
    polygon = [[4, 4, 24, 4, 24, 24, 4, 24]]
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": box, "area": 400.0, "iscrowd": 0}
            | {"segmentation": polygon}
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    (tmp_path / "ann.json").write_text(json.dumps(data))
    return f"pets={tmp_path / 'ann.json'},{tmp_path / 'images'}"


def test_overrides_may_stand_before_and_after_options():
    args = argument_parser().parse_intermixed_args(
        ["--config-file", "c.yaml", "a.b=1", "--resume", "c.d=2", "--num-gpus", "2"]
    )
    assert (args.opts, args.resume, args.num_gpus) == (["a.b=1", "c.d=2"], True, 2)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "no config; name a shipped one"),
        (
            ["--config-file", "nowhere.yaml"],
            "'nowhere.yaml' does not exist, neither as a file nor",
        ),
        (["--config-file", "{yaml}", "SOLVER.MAX_ITR=3"], "SOLVER.MAX_ITER"),
        (["--config-file", "{py}", "train.max_itr=3"], "train.max_iter"),
        (["--config-file", "{yaml}", "DATASETS.TRAIN=shapes_trian"], "shapes_train"),
        (["--config-file", "{py}", "dataloader.train.dataset=shapes_trian"], "shapes_train"),
        (["--config-file", "{yaml}", "--register", "x"], "NAME=annotations.json,image_dir"),
        (["--config-file", "{yaml}", "--num-gpus", "64"], "torchrun"),
        (["--config-file", "{yaml}", "MODEL.DEVICE=cuda"], "MODEL.DEVICE=cpu"),
        (["--config-file", "{yaml}", "--eval-only", "MODEL.WEIGHTS=gone.pth"], "gone.pth"),
        (["--config-file", "{yaml}", "MODEL.WEIGHTS=gone.pth"], "gone.pth"),
        (["--config-file", "{yaml}", "SOLVER.AMP.ENABLED=true"], "mixed precision needs a GPU"),
        (["--config-file", "{yaml}", "MODEL.WEIGHTS=''"], "frozen batch norm"),
        (["--config-file", "{yaml}", "MODEL.ROI_HEADS.NAME=StandardROIHead"], "StandardROIHeads"),
        (["--config-file", "{yaml}", "MODEL.BACKBONE.NAME=no_such_net"], "MODEL.BACKBONE.NAME"),
        (["--config-file", "{py}", "+model.roi_heads.colour=red"], "colour"),
        (["--config-file", "{yaml}", "SOLVER.OPTIMIZER=Adm"], "AdamW"),
        (["--config-file", "{yaml}", "MODEL.ROI_HEADS.NUM_CLASSES=5"], "5"),
        (["--config-file", "{yaml}", "OUTPUT_DIR=/dev/null/x"], "/dev/null/x"),
    ],
)
def test_mistake_ends_in_one_line_that_names_it(
    shapes_few, capsys, tmp_path, monkeypatch, argv, words
):
    from torch import cuda

    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    files = {kind: f"{CONFIGS['mask_rcnn']}.{kind}" for kind in ("yaml", "py")}
    argv = [a.format(**files) for a in argv]
    defaults = [f"train.output_dir={tmp_path / 'out'}"]
    defaults += [f"DATASETS.TRAIN={shapes_few}", f"DATASETS.TEST={shapes_few}"]
    assert run_main(*argv[:2], *(defaults if argv else []), *argv[2:]) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]


def test_traceback_is_shown_on_request(monkeypatch):
    def fail():
        raise UserError("no")

    monkeypatch.delenv("D2EXT_TRACEBACK", raising=False)
    assert run_guarded(fail) == 1
    monkeypatch.setenv("D2EXT_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_guarded(fail)


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_registered_data_decide_the_classes_of_the_model(coco_file, kind):
    experiment = build_experiment(
        f"{CONFIGS['htc']}.{kind}",
        [
            "DATASETS.TRAIN=pets",
            "DATASETS.TEST=pets",
            "train.init_checkpoint=''",
            "train.device=cpu",
        ],
        [coco_file],
    )
    assert "pets" in DatasetCatalog.list()
    assert experiment.metadata()["thing_classes"] == ["cat", "dog"]
    model = experiment.build_model()
    assert model.roi_heads.num_classes == 2
    assert model.roi_heads.box_predictor[0].cls_score.out_features == 3
    assert model.roi_heads.semantic_head.conv_logits.out_channels == 3  # two things and the rest
    batch = next(iter(experiment.build_train_loader()))
    assert batch[0]["sem_seg"].unique().tolist() == [0, 2]


@pytest.mark.parametrize(
    "kind, key", [("yaml", "MODEL.ROI_HEADS.NUM_CLASSES"), ("py", "model.roi_heads.num_classes")]
)
def test_class_count_that_contradicts_the_data_names_both_numbers(coco_file, kind, key):
    overrides = ["DATASETS.TRAIN=pets", "DATASETS.TEST=pets"]
    with pytest.raises(UserError, match="is 5.*2 classes"):
        build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", [*overrides, f"{key}=5"], [coco_file])
    build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", [*overrides, f"{key}=2"], [coco_file])


@pytest.mark.parametrize(
    "kind, key", [("yaml", "DATASETS.TEST"), ("py", "dataloader.test.dataset")]
)
def test_a_test_set_that_was_forgotten_is_named_by_its_key(coco_file, kind, key):
    with pytest.raises(UserError, match=f"'pets' and 'shapes_val' have .*; set {key} to the test"):
        build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", ["DATASETS.TRAIN=pets"], [coco_file])


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_no_data_set_at_all_is_named_by_the_key(kind):
    overrides = ["DATASETS.TRAIN=[]", "DATASETS.TEST=[]"]
    with pytest.raises(UserError, match="(DATASETS.TRAIN|dataloader.train.dataset) is empty"):
        build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", overrides)


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_no_training_set_is_named_by_the_key(shapes_few, kind):
    overrides = ["DATASETS.TRAIN=[]", f"DATASETS.TEST={shapes_few}"]
    experiment = build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", overrides)
    with pytest.raises(UserError, match="(DATASETS.TRAIN|dataloader.train.dataset) is empty"):
        check_runnable(experiment, torch.nn.Identity())


@pytest.mark.parametrize(
    "value, words", [(50, "50; .* did you mean 0.5"), (-1, "is -1"), (101, "is 101")]
)
def test_a_score_in_percent_is_refused(value, words):
    check_score("--confidence-threshold", 0.5)
    with pytest.raises(UserError, match=f"--confidence-threshold.*{words}"):
        check_score("--confidence-threshold", value)


def test_a_lazy_model_without_its_number_of_classes_is_refused_with_the_place(tmp_path):
    lines = ["from d2ext.config import get_config", '_base = get_config("mask_rcnn_tiny.py")']
    lines += ["model, dataloader, optimizer = _base.model, _base.dataloader, _base.optimizer"]
    lines += ["lr_multiplier, train = _base.lr_multiplier, _base.train"]
    lines += ['del model.roi_heads["num_classes"]']
    (tmp_path / "own.py").write_text("\n".join(lines))
    with pytest.raises(UserError, match="no model.roi_heads.num_classes, which is set to"):
        build_experiment(str(tmp_path / "own.py"))


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_eval_only_takes_the_last_checkpoint_of_the_output_folder(short_run, monkeypatch, kind):
    from d2ext.engine import loop

    train_run = short_run("mask_rcnn", kind, "run", "train.max_iter=2")
    loop.train(train_run)
    loaded = []
    load = loop.Checkpointer.load_complete
    monkeypatch.setattr(
        loop.Checkpointer, "load_complete", lambda self, p: (loaded.append(p), load(self, p))
    )
    # The config itself names the shipped backbone.
    experiment = short_run("mask_rcnn", kind, "run")
    experiment.init_checkpoint, experiment.weights_chosen = "d2ext://weights/x.pth", False
    loop.evaluate_checkpoint(experiment)
    assert loaded[0].endswith("run/model_final.pth")


@pytest.mark.parametrize(
    "name, kind, key",
    [
        ("mask_rcnn", "yaml", "TEST.DETECTIONS_PER_IMAGE"),
        ("mask_rcnn", "py", "model.roi_heads.box_predictor.test_topk_per_image"),
        ("htc", "py", "model.roi_heads.box_predictors.2.test_topk_per_image"),
    ],
)
@pytest.mark.parametrize("limit", [200, -1])
def test_scores_count_as_many_detections_as_the_model_may_find(
    short_run, shapes_few, name, kind, key, limit
):
    evaluator = short_run(name, kind, "run", f"{key}={limit}").build_evaluator(shapes_few)
    assert evaluator.max_detections == limit


def test_detectron2s_own_kind_of_optimiser_node_works(short_run):
    experiment = short_run("mask_rcnn", "py", "run")
    experiment.cfg.optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.03, momentum=0.8
    )
    model = experiment.build_model()
    optimizer = experiment.build_optimizer(model)
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.8
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for group in optimizer.param_groups for p in group["params"]} == trained
    assert "model" not in experiment.cfg.optimizer.params  # a saved config has no weights


@pytest.mark.parametrize("config", ["MNC/configs/mnc_tiny.py", "FCIS/configs/fcis_tiny.py"])
def test_limit_of_voting_counts_for_the_scores(shapes_few, config):
    path = CONFIGS["htc"].parents[2] / config
    experiment = build_experiment(str(path), with_data=False)
    assert experiment.build_evaluator(shapes_few).max_detections == 50


def test_registered_data_are_part_of_the_saved_config(coco_file):
    overrides = ["DATASETS.TRAIN=pets", "DATASETS.TEST=pets"]
    yaml = build_experiment(f"{CONFIGS['mask_rcnn']}.yaml", overrides, [coco_file])
    lazy = build_experiment(f"{CONFIGS['mask_rcnn']}.py", overrides, [coco_file])
    assert list(yaml.cfg.DATASETS.REGISTER) == list(lazy.cfg.dataloader.register) == [coco_file]
