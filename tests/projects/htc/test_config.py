import inspect
import re
from pathlib import Path

import pytest

from d2ext.config import add_modeling_config, load_config
from d2ext.engine import build_experiment
from d2ext.modeling import MultiStageROIHeads
from d2ext.modeling.regions.soft_nms import SoftNMS
from d2ext.projects.htc import HTCROIHeads, add_htc_config
from d2ext.projects.htc import config as htc_config

from detectron2.config import get_cfg

CONFIGS = Path(__file__).resolve().parents[3] / "projects/HTC/configs"


def test_there_are_at_most_forty_keys_and_each_has_a_comment():
    lines = [x.strip() for x in inspect.getsource(htc_config).splitlines()]
    keys = [i for i, x in enumerate(lines) if re.match(r"(htc|semantic)\.[A-Z_]+ = ", x)]
    assert 10 < len(keys) <= 40
    for i in keys:
        assert lines[i - 1].startswith("#") or i - 1 in keys, lines[i]


def test_defaults_are_those_of_the_released_models():
    cfg = get_cfg()
    add_htc_config(cfg)
    htc = cfg.MODEL.HTC
    assert htc.INTERLEAVED and htc.MASK_INFO_FLOW and htc.SEMANTIC.ENABLED
    assert htc.STAGE_LOSS_WEIGHTS == [1, 0.5, 0.25]
    assert htc.SEMANTIC.LOSS_WEIGHT == 0.2 and htc.SEMANTIC.NUM_CONV == 4
    assert htc.SEMANTIC.FUSION == ["box", "mask"]


def test_keys_of_detectron2_stay_as_they_are():
    plain, ours = get_cfg(), get_cfg()
    add_htc_config(ours)
    del ours.MODEL["HTC"]
    assert ours == plain


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_box_loss_of_the_rpn_turns_at_one_ninth(kind):
    cfg = load_config(CONFIGS / f"htc_R_50_FPN_1x_coco.{kind}")
    beta = cfg.model.proposal_generator if kind == "py" else cfg.MODEL.RPN
    assert beta[{"py": "smooth_l1_beta", "yaml": "SMOOTH_L1_BETA"}[kind]] == 1 / 9


def test_lazy_defaults_equal_the_yaml_defaults():
    cfg = get_cfg()
    add_modeling_config(cfg)
    add_htc_config(cfg)
    signature = {
        **inspect.signature(MultiStageROIHeads.__init__).parameters,
        **inspect.signature(HTCROIHeads.__init__).parameters,
    }
    for argument, value in {
        "interleaved": cfg.MODEL.HTC.INTERLEAVED,
        "mask_info_flow": cfg.MODEL.HTC.MASK_INFO_FLOW,
        "mask_ensemble": cfg.MODEL.HTC.MASK_ENSEMBLE,
        "score_average": cfg.MODEL.HTC.SCORE_AVERAGE,
        "soft_nms": cfg.MODEL.SOFT_NMS.METHOD,
        "soft_nms_sigma": cfg.MODEL.SOFT_NMS.SIGMA,
        "soft_nms_min_score": cfg.MODEL.SOFT_NMS.MIN_SCORE,
        "stage_loss_weights": tuple(cfg.MODEL.HTC.STAGE_LOSS_WEIGHTS),
        "semantic_fusion": tuple(cfg.MODEL.HTC.SEMANTIC.FUSION),
    }.items():
        assert signature[argument].default == value


@pytest.mark.parametrize(
    "kind, overrides",
    [
        (
            "yaml",
            [
                "MODEL.SOFT_NMS.METHOD=gaussian",
                "MODEL.SOFT_NMS.SIGMA=0.3",
                "MODEL.SOFT_NMS.MIN_SCORE=0.02",
            ],
        ),
        (
            "py",
            [
                "model.roi_heads.soft_nms=gaussian",
                "model.roi_heads.soft_nms_sigma=0.3",
                "model.roi_heads.soft_nms_min_score=0.02",
            ],
        ),
    ],
)
def test_soft_nms_is_a_switch_of_both_kinds_of_config(kind, overrides):
    experiment = build_experiment(str(CONFIGS / f"htc_tiny.{kind}"), overrides)
    assert experiment.build_model().roi_heads.soft_nms == SoftNMS("gaussian", 0.5, 0.3, 0.02)
