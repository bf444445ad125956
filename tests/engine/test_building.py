"""What cannot be built from a config is one line that names the key, for both kinds."""

import pytest

from d2ext.engine import build_experiment, train
from d2ext.errors import UserError

from tests.engine.helpers import CONFIGS, short_overrides

_ANCHORS = "model.proposal_generator.anchor_generator"


@pytest.mark.parametrize(
    "kind, override, words",
    [
        (
            "yaml",
            "MODEL.ANCHOR_GENERATOR.SIZES=[[8],[16]]",
            "sizes of length 2 in anchor generator",
        ),
        ("py", f"{_ANCHORS}.sizes=[[8],[16]]", f"see {_ANCHORS}.sizes = "),
        ("yaml", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS=[[1.0],[2.0]]", "aspect_ratios of length 2"),
        ("py", f"{_ANCHORS}.aspect_ratios=[[1.0],[2.0]]", "aspect_ratios of length 2"),
        ("yaml", "MODEL.FPN.NORM=XX", "MODEL.FPN.NORM: no such name as 'XX'"),
        ("py", "model.backbone.norm=XX", "model.backbone.norm: no such name as 'XX'"),
        ("yaml", "MODEL.ROI_HEADS.IN_FEATURES=[p9]", "MODEL.ROI_HEADS.IN_FEATURES: no such name"),
        ("yaml", "MODEL.ROI_BOX_HEAD.POOLER_TYPE=foo", "see MODEL.ROI_BOX_HEAD.POOLER_TYPE = foo"),
        ("py", "model.roi_heads.box_pooler.pooler_type=foo", "Unknown pooler type: foo"),
        (
            "yaml",
            "MODEL.RESNETS.DEPTH=51",
            "MODEL.RESNETS.DEPTH: no such name as 51",
        ),
        ("yaml", "MODEL.ROI_HEADS.IOU_THRESHOLDS=[0.5,0.6]", "assert len"),
        ("py", "+model.backbone._target_=nowhere.Foo", "'model.backbone._target_': .*nowhere.Foo"),
        ("py", "+model._target_=detectron2.modeling.NoSuch", "'model._target_'"),
        (
            "py",
            "+model.backbone._target_=3",
            "'model.backbone._target_': 3 is no class or function",
        ),
        ("py", "model.roi_heads.mask_in_features=${no.such}", "'model.roi_heads.mask_in_features'"),
    ],
)
def test_a_model_that_cannot_be_built_names_the_key(kind, override, words):
    overrides = ["MODEL.BACKBONE.NAME=build_resnet_backbone"] * ("DEPTH" in override) + [override]
    experiment = build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", overrides, with_data=False)
    with pytest.raises(UserError, match=words) as error:
        experiment.build_model()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, override, words",
    [
        ("yaml", "MODEL.RPN.BBOX_REG_LOSS_TYPE=foo", "MODEL.RPN.BBOX_REG_LOSS_TYPE = foo"),
        ("py", "model.roi_heads.box_in_features=[p2,p3,p4,p9]", r"model.roi_heads.*'p9'"),
        (
            "yaml",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE=foo",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = foo",
        ),
    ],
)
def test_a_setting_that_shows_in_the_first_iteration_only_is_named(
    kind, override, words, register_few, tmp_path
):
    overrides = [*short_overrides("mask_rcnn", kind, tmp_path / "run", "demo_few"), override]
    experiment = build_experiment(f"{CONFIGS['mask_rcnn']}.{kind}", overrides, [register_few])
    with pytest.raises(UserError, match=f"the first iteration cannot be .*{words}") as error:
        train(experiment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "output_dir",
        "device",
        "max_iter",
        "seed",
        "amp",
        "checkpointer",
        "eval_period",
        "log_period",
    ],
)
def test_a_lazy_config_without_a_field_names_it(tmp_path, key):
    lines = ["from d2ext.config import get_config", '_base = get_config("mask_rcnn_tiny.py")']
    lines += ["model, dataloader, optimizer = _base.model, _base.dataloader, _base.optimizer"]
    lines += [
        "lr_multiplier, train = _base.lr_multiplier, dict(_base.train)",
        f"del train['{key}']",
    ]
    (tmp_path / "own.py").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"the lazy config has no train.{key}"):
        build_experiment(str(tmp_path / "own.py"), with_data=False)


@pytest.mark.parametrize(
    "override, words",
    [
        ("train=null", "no train.output_dir"),
        ("train.checkpointer=null", "no train.checkpointer.period"),
        ("train.max_iter=${train.nothing}", "'train.max_iter': .*'train.nothing' not found"),
        ("+train.seed=abc", "'train.seed' is 'abc'; it has to be a whole number"),
        ("+train.amp.enabled=1", "'train.amp.enabled' is 1; it has to be true or false"),
        ("+train.max_iter=true", "'train.max_iter' is True; it has to be a whole number"),
        ("dataloader.test=null", "no dataloader.test.mapper.image_format"),
    ],
)
def test_a_part_of_a_lazy_config_that_is_of_no_use_is_named(override, words):
    with pytest.raises(UserError, match=words):
        build_experiment(f"{CONFIGS['mask_rcnn']}.py", [override], with_data=False)


@pytest.mark.parametrize(
    "override, build, words",
    [
        ("optimizer=null", "build_optimizer", "'optimizer' is None"),
        ("lr_multiplier=null", "build_lr_multiplier", "'lr_multiplier' is None"),
        ("+optimizer._target_=no.such", "build_optimizer", "'optimizer._target_'"),
        ("+optimizer.betas=[0.9]", "build_optimizer", "'optimizer' .* cannot be built"),
        ("optimizer.clip_gradients=5", "build_optimizer", "clip_gradients is 5"),
        ("+lr_multiplier._target_=no.such", "build_lr_multiplier", "'lr_multiplier._target_'"),
    ],
)
def test_an_optimiser_or_schedule_that_cannot_be_built_is_named(override, build, words):
    experiment = build_experiment(f"{CONFIGS['mask_rcnn']}.py", [override], with_data=False)
    arguments = [experiment.build_model()] if build == "build_optimizer" else []
    with pytest.raises(UserError, match=words):
        getattr(experiment, build)(*arguments)
