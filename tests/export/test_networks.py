"""Forms of the networks, and files of ONNX made of them, find what the networks find."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from d2ext.export import build_form, export_onnx
from d2ext.export.drawing import draw_masks

from detectron2.structures import Boxes, Instances

from tests.export.helpers import CONFIGS, build, image

NETWORKS = list(CONFIGS)
MARGIN = 1e-3  # of the threshold of masks
SIZES = [(96, 130), (128, 128), (160, 107)]


def instances(outputs, form, size):
    """What a form or a session gives -> detections with drawn masks."""
    boxes, scores, classes, masks = (torch.as_tensor(np.asarray(x)) for x in outputs)
    least, most = (
        draw_masks(form.drawing, masks, boxes, size, form.mask_threshold + margin)
        for margin in (MARGIN, -MARGIN)
    )
    return Instances(
        size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes, least=least, most=most
    )


def assert_same(found, wanted):
    """The detections, in the same order. Every pixel of a mask is the same, but for those so near
    to the threshold that rounding decides."""
    assert len(found) == len(wanted)
    assert found.pred_classes.tolist() == wanted.pred_classes.tolist()
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)
    boxes, others = found.pred_boxes.tensor, wanted.pred_boxes.tensor
    torch.testing.assert_close(boxes, others, atol=1e-3, rtol=0)
    assert not (found.least & ~wanted.pred_masks).any()
    assert not (wanted.pred_masks & ~found.most).any()


@functools.cache
def network(name):
    return build(name)


@functools.cache
def exported(name, folder, all_stages=False):
    """A form and the session of its file."""
    form = build_form(network(name), all_stages)
    path = f"{folder}/{name}_{all_stages}.onnx"
    export_onnx(form, path, {"d2ext.test": "1"})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return form, session, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("onnx"))


@torch.no_grad()
def predict(name, x, size):
    inputs = {"image": x, "height": size[0], "width": size[1]}
    return network(name)([inputs])[0]["instances"]


@torch.no_grad()
def call(form, x, size):
    height, width = x.shape[-2:]
    # What pads the picture does not matter.
    padded = torch.nn.functional.pad(x, (0, -width % 32, 0, -height % 32), value=99.0)
    return form(padded, torch.tensor((height, width)), torch.tensor(size))


def run(session, x, size):
    return session.run(None, {"image": x.numpy(), "output_size": np.array(size, np.int64)})


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", SIZES)
def test_a_form_finds_what_the_network_finds(name, size):
    x, output = image(size), (size[0] * 2 + 1, size[1] * 2)
    with torch.no_grad():
        form = build_form(network(name))
        found = instances(call(form, x, output), form, output)
    wanted = predict(name, x, output)
    assert len(wanted) >= 3
    assert_same(found, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_finds_what_pytorch_finds_at_any_size(name, folder):
    form, session, path = exported(name, folder)
    for seed, size in enumerate(SIZES):
        x, output = image(size, seed), (size[0] * 2 + 1, size[1] * 2)
        wanted, found = predict(name, x, output), run(session, x, output)
        assert len(wanted) >= 3
        assert_same(instances(found, form, output), wanted)
        masks = call(form, x, output)[3]
        torch.testing.assert_close(torch.from_numpy(found[3]), masks, atol=1e-4, rtol=0)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions and {x.key: x.value for x in model.metadata_props}["d2ext.test"]


def test_a_cascade_has_the_results_of_networks_that_end_after_each_stage(folder, monkeypatch):
    form, session, _ = exported("cascade", folder, all_stages=True)
    x, output = image(SIZES[0]), (190, 261)
    found = run(session, x, output)
    assert [x.name for x in session.get_outputs()] == form.output_names()
    for first, stages in ((0, 3), (4, 1), (8, 2)):  # the result of all stages comes first
        monkeypatch.setattr(network("cascade").roi_heads, "num_cascade_stages", stages)
        wanted = predict("cascade", x, output)
        assert len(wanted) >= 3
        assert_same(instances(found[first : first + 4], form, output), wanted)
