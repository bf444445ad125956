import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.utils.testing import random_batch, tiny_config

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage


@pytest.fixture
def model():
    cfg = tiny_config()
    cfg.MODEL.META_ARCHITECTURE = "ReproducibleRCNN"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "InsideAnchorRPN"
    cfg.MODEL.ROI_HEADS.NAME = "PlainCascade"
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 16  # so that sampling leaves something out
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    torch.manual_seed(0)
    return build_model(cfg)


def losses(model, batch):
    with EventStorage():
        return {k: v.item() for k, v in model.train()(batch).items()}


def test_training_depends_on_the_sample_seeds_only(model):
    batch = random_batch()
    torch.manual_seed(1)
    first = losses(model, batch)
    assert losses(model, batch) == first
    for x in batch:
        x["sample_seed"] += 1
    assert losses(model, batch) != first


def test_ground_truth_without_area_is_left_out(model):
    batch = random_batch()
    expected = losses(model, batch)
    for x in batch:
        empty = x["instances"][:1]
        empty.gt_boxes = Boxes(empty.gt_boxes.tensor[:, [0, 1, 0, 3]])
        x["instances"] = Instances.cat([empty, x["instances"]])
    assert losses(model, batch) == expected


def test_without_sample_seeds_the_global_generator_decides(model):
    batch = random_batch()
    for x in batch:
        del x["sample_seed"]
    torch.manual_seed(1)
    first = losses(model, batch)
    assert losses(model, batch) != first
    torch.manual_seed(1)
    assert losses(model, batch) == first


def test_stage_results_are_postprocessed_and_end_with_the_result_of_forward(model):
    batch = random_batch()
    for x in batch:
        x["height"], x["width"] = 128, 192
    model.eval()
    stages = model.inference_stages(batch)
    with torch.no_grad():
        full = model(batch)
    assert len(stages) == 3
    for a, b in zip(stages[-1], full):
        assert a["instances"].image_size == (128, 192)
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)
        assert a["instances"].pred_masks.shape[1:] == (128, 192)


def test_stage_results_need_evaluation_mode(model):
    with pytest.raises(AssertionError, match="eval"):
        model.train().inference_stages(random_batch())


def test_all_processes_pad_their_images_to_one_size(model, monkeypatch):
    from d2ext.modeling import detector

    def as_if_another_process_had_larger_images(sizes, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        sizes.copy_(torch.maximum(sizes, sizes.new_tensor([160, 64])))

    batch = random_batch()
    alone = model.train().preprocess_image(batch)
    assert alone.tensor.shape[-2:] == (64, 96)
    monkeypatch.setattr(detector.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", as_if_another_process_had_larger_images)
    together = model.preprocess_image(batch)
    assert together.tensor.shape[-2:] == (160, 96)
    assert together.image_sizes == alone.image_sizes
    assert torch.equal(together.tensor[..., :64, :], alone.tensor)
    assert not together.tensor[..., 64:, :].any()
    assert model.eval().preprocess_image(batch).tensor.shape[-2:] == (64, 96)
