"""examples/mask_scoring as somebody else's package: installed, and used by the tools."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/mask_scoring"
KINDS = ("yaml", "py")


@pytest.fixture(scope="module")
def site(installed):
    return installed(EXAMPLE)


@pytest.fixture(scope="module")
def annotations(shapes_root):
    return Path(shapes_root, "shapes/train/annotations.json")


@pytest.fixture(scope="module")
def outputs(site, annotations, run_scripts, tmp_path_factory):
    """Output folders by kind of config, after a training of ten iterations, ten more, an
    evaluation, a prediction and a drawing, all by tools of the repository."""
    work = tmp_path_factory.mktemp("mask_scoring")
    image = sorted((annotations.parent / "images").iterdir())[0]
    data = ["--register", f"few={annotations},{annotations.parent / 'images'}"]
    for kind in KINDS:
        output = work / kind
        config = [
            "--config-file",
            site / f"mask_scoring/configs/mask_scoring_tiny.{kind}",
            *data,
            "DATASETS.TRAIN=few",
            "MODEL.DEVICE=cpu",
            f"OUTPUT_DIR={output}",
        ]
        training = ["tools/train_net.py", *config, "SOLVER.IMS_PER_BATCH=2", "SOLVER.BASE_LR=0.005"]
        training += ["DATASETS.TEST=[]", "LOG_PERIOD=1", "--no-data-check"]
        results = output / "inference/few/coco_instances_results.json"
        run_scripts(
            [*training, "SOLVER.MAX_ITER=10"],
            [*training, "SOLVER.MAX_ITER=20", "--resume"],
            ["tools/train_net.py", *config, "DATASETS.TEST=few", "--eval-only"],
            ["demo/demo.py", *config, "DATASETS.TEST=few", "--confidence-threshold", "0"]
            + ["--weights", output / "model_final.pth", "--input", image]
            + ["--output", output / "pictures"],
            ["tools/visualize_results.py", *data, "--results", results, "--num-images", "1"]
            + ["--output-dir", output / "drawn", "--confidence-threshold", "0.001"],
            path=[site],
        )
    return {kind: work / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_and_resumes(outputs, kind):
    lines = (outputs[kind] / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records = [r for r in records if "loss_mask_iou" in r]
    assert [r["iteration"] for r in records] == list(range(20))
    assert all(r["loss_mask_iou"] > 0 for r in records)
    stored = torch.load(outputs[kind] / "model_final.pth", weights_only=True)
    assert stored["iteration"] == 19
    assert "roi_heads.mask_iou_head.predictor.weight" in stored["model"]


def reference_ap(annotations, results, kind):
    """AP in percent by pycocotools alone."""
    field = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = [{k: v for k, v in r.items() if k != field} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_ranked_by_their_scores_and_masks_by_theirs(outputs, kind, annotations):
    folder = outputs[kind] / "inference/few"
    results = json.loads((folder / "coco_instances_results.json").read_text())
    assert any(r["mask_score"] != r["score"] for r in results)
    by_mask = [{**r, "score": r["mask_score"]} for r in results]
    for task, ranked in (("bbox", results), ("segm", by_mask)):
        measured = json.loads((folder / f"{task}_by_class.json").read_text())["all"]["AP"]
        assert measured == pytest.approx(reference_ap(annotations, ranked, task), abs=1e-6)
        assert measured > 0
    assert reference_ap(annotations, results, "segm") != pytest.approx(measured, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_predictions_are_written(outputs, kind):
    predictions = json.loads((outputs[kind] / "pictures/predictions.json").read_text())
    assert predictions and all("mask_score" in p for p in predictions)
    assert len(list((outputs[kind] / "pictures").glob("*.png"))) == 1
    assert len(list((outputs[kind] / "drawn").glob("*.png"))) == 1


def test_the_collection_does_not_know_it():
    files = [p for name in ("d2ext", "projects", "configs", "tools", "demo") for p in walk(name)]
    assert len(files) > 200
    known = [p for p in files if "mask_scoring" in p.read_text(errors="ignore").lower()]
    assert known == []


def walk(folder):
    suffixes = {".py", ".yaml", ".j2", ".cpp", ".cu", ".h"}  # READMEs may point to it
    return [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]


def test_it_is_small():
    paths = [p for p in EXAMPLE.rglob("*.py") if "tests" not in p.parts and "build" not in p.parts]
    assert sum(len(p.read_text().splitlines()) for p in paths) < 350
