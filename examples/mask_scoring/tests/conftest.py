"""Fixtures: few generated images, one thread, fixed seeds."""

import mask_scoring  # noqa: F401, I001  before detectron2, which it adapts by importing d2ext
import pytest
import torch

from d2ext.engine import twins
from d2ext.utils.testing import tiny_config

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def small_data(data_folder):
    """The built-in data sets while a test lasts, with few images."""
    with twins.few_images(data_folder):
        yield


@pytest.fixture
def cfg():
    """A tiny network for 3 classes."""
    cfg = tiny_config(mask_scoring.add_mask_scoring_config)
    cfg.MODEL.ROI_HEADS.NAME = "MaskScoringROIHeads"
    cfg.MODEL.MASK_SCORING.CONV_DIM = 8
    cfg.MODEL.MASK_SCORING.FC_DIM = 16
    return cfg
