"""`d2ext compare`: which models and data it takes, what it writes, and what it says of mistakes."""

import json
import shutil

import pytest

from d2ext.data import parse_register, register_coco_dataset
from d2ext.report.sources import load_truth

HTC = "projects/HTC/configs/htc_tiny.py"
MASK_RCNN = "configs/mask_rcnn_tiny.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def perfect(register_few, tmp_path):
    """Path of results that are the truth itself."""
    register_coco_dataset(*parse_register(register_few))
    _, truth = load_truth("demo_few")
    results = []
    for image in truth.images:
        for a in image.annotations:
            rle = truth.rle(image, a)
            if isinstance(rle["counts"], bytes):
                rle = {**rle, "counts": rle["counts"].decode()}
            result = {"image_id": image.image_id, "bbox": a["bbox"], "score": 0.9}
            category = truth.category_ids[a["label"]]
            results.append({**result, "category_id": category, "segmentation": rle})
    (tmp_path / "run/inference/demo_few").mkdir(parents=True)
    path = tmp_path / "run/inference/demo_few/coco_instances_results.json"
    path.write_text(json.dumps(results))
    return path


def test_networks_of_both_kinds_of_config_and_saved_predictions_are_compared(
    script, mask_rcnn_weights, htc_weights, perfect, register_few, tmp_path, capsys
):
    command = [f"first={MASK_RCNN},{mask_rcnn_weights}", f"{HTC},{htc_weights}", str(perfect)]
    command += ["--register", register_few, "--output", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--override", "first:MODEL.RESNETS.NORM=GN"]
    assert script.main([*command, "--override", "weights:model.backbone.norm=GN"]) == 0
    out = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(numbers) == ["first", "weights", "run"]
    assert numbers["run"]["segm/AP"] == numbers["run"]["bbox/AP"] == 100
    assert numbers["first"]["seconds per image"] > 0 and numbers["first"]["parameters"] > 1e6
    assert "stage3/segm/AP" in numbers["weights"] and "stage1/segm/AP" not in numbers["first"]
    assert numbers["weights"]["stage3/segm/AP"] == numbers["weights"]["segm/AP"]
    assert "seconds per image" not in numbers["run"]
    assert "run: mask AP 100.0 (100.0 to 100.0)" in out and "report.html" in out
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "weights, stage by stage" in page and "https://" not in page and "http://" not in page
    saved = tmp_path / "out/predictions/first.json"
    again = [f"first={saved}", "--register", register_few, "--output", str(tmp_path / "again")]
    assert script.main(again) == 0
    repeated = json.loads((tmp_path / "again/metrics.json").read_text())
    assert repeated["first"]["segm/AP"] == numbers["first"]["segm/AP"]
    assert {p.name for p in (tmp_path / "out/predictions").iterdir()} == {
        "first.json", "weights.json",
    }  # fmt: skip


def test_predictions_of_d2ext_predict_are_taken_too(script, perfect, register_few, tmp_path):
    records, truth = load_truth("demo_few")
    files = {record["image_id"]: record["file_name"] for record in records}
    names = dict(zip(truth.category_ids, truth.class_names))
    results = json.loads(perfect.read_text())
    for number, result in enumerate(results):
        result["category"] = names[result["category_id"]]
        result["file_name"] = files[result["image_id"]]
        result["category_id"] = result["image_id"] = number + 500
    (tmp_path / "predictions.json").write_text(json.dumps(results))
    command = [str(tmp_path / "predictions.json"), "--register", register_few]
    assert script.main([*command, "--output", str(tmp_path / "out")]) == 0
    (values,) = json.loads((tmp_path / "out/metrics.json").read_text()).values()
    assert values["segm/AP"] == 100


def test_a_folder_of_a_run_is_enough(script, register_few, tmp_path, monkeypatch, capsys):
    """Weights, config and test set are those of the training; its losses are in the page."""
    from d2ext.engine import build_experiment, train

    options = [f"OUTPUT_DIR={tmp_path / 'runs/mine'}", "MODEL.RESNETS.NORM=GN", "MODEL.WEIGHTS=''"]
    options += ["DATASETS.TRAIN=demo_few", "DATASETS.TEST=demo_few", "SOLVER.MAX_ITER=2"]
    options += ["SOLVER.IMS_PER_BATCH=1", "LOG_PERIOD=1", "MODEL.DEVICE=cpu"]
    train(build_experiment(MASK_RCNN, options, [register_few]))
    monkeypatch.chdir(tmp_path)
    assert script.main([str(tmp_path / "runs/mine"), "--output", "out", "--device", "cpu"]) == 0
    assert "4 images of demo_few" in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "How the trainings went" in page and "model_final.pth" in page
    assert list(json.loads((tmp_path / "out/metrics.json").read_text())) == ["mine"]


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (["gone"], [], "gone does not exist; give the folder of a training"),
        (["a,b,c"], [], "cannot read model 'a,b,c'"),
        (["{tmp}"], [], "has no model_best.pth, model_final.pth or last checkpoint"),
        (["{results}"], [], "which data set? give --data FOLDER"),
        (["{results}"], ["--data", "shapes_vall"], "neither a folder nor a registered data set"),
        (["{results}"], ["--data", "shapes", "--pictures", "-1"], "--pictures must not be"),
        (["{results}"], ["--images", "x"], "--images is for --data"),
        (["htc_tinny,{results}"], [], "config 'htc_tinny' does not exist"),
        (["htc_tiny,{results}"], [], "predictions need no config"),
        (["{results}", "{config},{results}.pth"], ["--override", "SEED"], "write KEY=VALUE or"),
        (["{config},{results}.pth"], ["--override", "b:SEED=1"], "there is no model 'b'"),
    ],
)
def test_mistakes_end_in_one_line(script, perfect, tmp_path, capsys, models, options, words):
    (perfect.parent / f"{perfect.name}.pth").touch()
    models = [m.format(tmp=tmp_path, results=perfect, config=MASK_RCNN) for m in models]
    assert script.main([*models, *options, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 999}, "results for image 999, which is not in the set"),
        ({"category_id": 99}, "category 99, the data set has 1, 2"),
        ({"bbox": [1, 2, 3]}, "entry 0: bbox has to be four finite numbers"),
        ({"score": "high"}, "score a finite one"),
        ({"segmentation": None}, "has no segmentation, but others have"),
        ({"segmentation": {"size": [2, 2], "counts": "04"}}, "masks of (2, 2)"),
        ({"segmentation": {"size": [128, 128]}}, "neither polygons nor"),
        ({"category": "cat", "file_name": "x.png"}, "the class 'cat', the data set has"),
        ({"category": "disk", "file_name": "no.png"}, "results for no.png, which is not in"),
    ],
)
def test_predictions_that_do_not_fit_are_one_line(
    script, perfect, register_few, tmp_path, capsys, change, words
):
    results = json.loads(perfect.read_text())
    results[0].update(change)
    perfect.write_text(json.dumps(results))
    command = [str(perfect), "--register", register_few, "--output", str(tmp_path / "out")]
    assert script.main(command) == 1
    error = capsys.readouterr().err
    assert words in error and str(perfect) in error and error.count("\n") == 1


def test_models_of_other_classes_are_refused(
    script, mask_rcnn_weights, few_images, tmp_path, capsys
):
    data = json.loads((few_images / "few.json").read_text())
    for entry in data["categories"]:
        entry["name"] += " 2"
    (tmp_path / "renamed.json").write_text(json.dumps(data))
    command = [f"{MASK_RCNN},{mask_rcnn_weights}", "--output", str(tmp_path / "out")]
    command += ["--override", "MODEL.RESNETS.NORM=GN", "--pictures", "1"]
    command += ["--register", f"renamed_few={tmp_path / 'renamed.json'},{few_images / 'images'}"]
    assert script.main(command) == 1
    assert "was trained on classes: number 0 is 'disk' there" in capsys.readouterr().err
    assert script.main([*command, "--rename-classes"]) == 0


def test_runs_of_one_name_are_told_apart(script, perfect, register_few, tmp_path):
    other = tmp_path / "elsewhere/run/inference/demo_few"
    shutil.copytree(perfect.parent, other)
    command = [str(perfect), str(other / perfect.name), "--register", register_few]
    assert script.main([*command, "--output", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(numbers) == ["run", "run 2"]
