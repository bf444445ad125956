"""onnxruntime finds what PyTorch finds: networks, on images of three sizes."""

import importlib.util
from pathlib import Path

import pytest

from d2ext.export import build_form, export_onnx
from d2ext.export.settings import FileSettings

from tests.export.helpers import CONFIGS, build
from tests.soak.conftest import FULL

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 50 if FULL else 2
SIZES = (96, 128, 200)


@pytest.fixture(scope="module")
def engines():
    """`dev/compare_engines.py`, as a module."""
    path = ROOT / "dev/compare_engines.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from d2ext.data import shapes

    folder = Path(shapes.generate("val", str(tmp_path_factory.mktemp("datasets")), IMAGES))
    return sorted((folder / "images").iterdir())


@pytest.mark.parametrize("network", CONFIGS)
def test_onnxruntime_agrees_with_pytorch(
    network, engines, pictures, tmp_path, monkeypatch, counted
):
    monkeypatch.chdir(ROOT)
    model = build(network)
    form, path = build_form(model), str(tmp_path / "model.onnx")
    mean, std = (x.flatten().tolist() for x in (model.pixel_mean, model.pixel_std))
    settings = FileSettings(
        network, [], "BGR", 128, 320, mean, std, form.drawing, form.mask_threshold, 1, 0, "", "",
        "", "",
    )  # fmt: skip
    export_onnx(form, path, settings.to_texts())
    inputs = engines.inputs_of(pictures, SIZES, "BGR")
    result = engines.compare(model, engines.OnnxModel(path), inputs)
    counts = {name: round(value, 6) for name, value in result._asdict().items()}
    counted({"network": network, **counts})
    assert result.images == IMAGES * len(SIZES) and result.detections > 3 * result.images
    # Every detection agrees but those of which PyTorch itself decides either way. They are few.
    assert result.unexplained == 0
    assert result.missing + result.extra <= result.detections / 100
    assert result.box <= 1e-3 and result.score <= 1e-4 and result.overlap >= 0.999
    assert engines.foreign_operators(path) == []
