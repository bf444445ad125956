"""Conversion of checkpoints of other programs, and back."""

import struct
import sys
from pathlib import Path

import pytest
import torch

from d2ext.checkpoint import Checkpointer, export_weights, list_importers, read_metadata
from d2ext.config.stored import flat_settings
from d2ext.engine import build_experiment

ROOT = Path(__file__).resolve().parents[2]
HTC_TINY = str(ROOT / "projects/HTC/configs/htc_tiny.yaml")


@pytest.fixture
def convert(script, monkeypatch, capsys):
    """`convert(*arguments)` runs the tool: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        status = script.run_guarded(script.main)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint of ours for htc_tiny, with batch norm so that MMDetection has names for it."""
    experiment = build_experiment(HTC_TINY, with_data=False)
    model = experiment.build_model()
    metadata = {"thing_classes": ["circle", "square", "triangle"]}
    Checkpointer(model, str(tmp_path), metadata=metadata).save("ours")
    return tmp_path / "ours.pth", model


@pytest.mark.parametrize("ending", ["pkl", "pth", "safetensors"])
def test_exported_and_converted_weights_are_the_same(convert, tiny, tmp_path, ending):
    ours, model = tiny
    foreign, back = tmp_path / "mmdet.pth", tmp_path / f"back.{ending}"
    common = ("--project", "htc", "--config-file", HTC_TINY)
    status, out, err = convert(*common, "--in", ours, "--out", foreign, "--export")
    assert (status, err) == (0, "") and f"wrote {foreign}: " in out
    exported = torch.load(foreign, weights_only=True)
    assert exported["meta"]["CLASSES"] == ("circle", "square", "triangle")
    assert "roi_head.semantic_head.conv_embedding.conv.weight" in exported["state_dict"]
    status, out, err = convert(*common, "--in", foreign, "--out", back)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].startswith("in the model") and "setting pixel_mean = " in out
    assert "roi_heads.semantic_head.conv_embedding.bias" in out
    metadata = read_metadata(str(back))
    assert metadata["thing_classes"] == ["circle", "square", "triangle"]
    assert metadata["imported_from"] == "MMDetection HTC"
    assert metadata["settings"]["roi_heads.mask_ensemble"] == "mean"
    config = flat_settings(metadata["config"], str(back))
    assert config["MODEL.PIXEL_MEAN"] == pytest.approx(metadata["settings"]["pixel_mean"])
    again = build_experiment(HTC_TINY, with_data=False).build_model()
    Checkpointer(again).load_complete(str(back))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_tool_refuses_what_does_not_fit_in_one_line(convert, tiny, tmp_path):
    ours, model = tiny
    common = ("--project", "htc", "--config-file", HTC_TINY)
    importer = next(x for x in list_importers() if x.name == "mmdet-htc")
    state = export_weights(model.state_dict(), importer.rules(model))
    del state["neck.fpn_convs.0.conv.bias"]
    torch.save({"state_dict": state}, tmp_path / "less.pth")
    out = tmp_path / "x.pkl"
    status, table, err = convert(*common, "--in", tmp_path / "less.pth", "--out", out, "--brief")
    assert status == 1 and err.count("\n") == 1
    assert "1 tensors of the model are not in it, e.g. 'neck.fpn_convs.0.conv.bias'" in err
    assert "neck.fpn_convs.0.conv.bias  64     missing" in table and not out.exists()
    assert convert(*common, "--in", tmp_path / "less.pth", "--out", out, "--partial")[0] == 0
    assert out.exists()
    for arguments, text in (
        ((*common, "--in", ours), "has the names of this model already"),
        ((*common, "--in", tmp_path / "less.pth", "--partial", "--out", "x.bin"), ".pkl, .pth or"),
        (("--project", "hct", "--in", ours), "no project 'hct'; known are"),
        (("--in", ours), "add --project"),
        (("--project", "mnc", "--in", ours), "no config of project 'mnc' is known"),
        (("--project", "htc", "--in", tmp_path / "absent"), "No such file"),
        ((*common, "--in", ours, "--export"), "--export needs --out"),
        (("--project", "htc", "--in", ours, "--export"), "--export needs --config-file"),
        (
            (*common, "--in", tmp_path / "less.pth", "--export", "--out", "x"),
            "tensors of the model are not in it",
        ),
    ):
        status, _, err = convert(*arguments)
        assert status == 1 and text in err and err.count("\n") == 1, err


def test_the_tool_finds_the_config_for_a_file(convert, tmp_path):
    """A file with one tensor of FCIS, of which everything else is missing."""
    name = b"arg:fcis_cls_seg_bias"
    data = (
        struct.pack("<3Q", 0x112, 0, 1) + struct.pack("<2I3i", 1, 2058, 1, 0, 0) + bytes(4 * 2058)
    )
    (tmp_path / "fcis.params").write_bytes(data + struct.pack("<2Q", 1, len(name)) + name)
    status, out, err = convert("--project", "fcis", "--in", tmp_path / "fcis.params", "--brief")
    assert status == 1 and "tensors of the model are not in it" in err
    first = out.splitlines()[0]
    assert first.endswith("fcis_R_101_voc_sds.yaml MODEL.RESNETS.DEPTH=50"), first
    assert "setting roi_heads.box2box_transform.weights = [5.0, 5.0, 2.0, 2.0]" in out
