"""dev/write_model_zoo.py: no number without the run that made it."""

import hashlib
import json

import pytest
import yaml


def make_run(root, script, name, seed, ap, last=400):
    """A run folder as dev/train_zoo.py leaves it."""
    plan = next(run for run in script.RUNS if run.name == name)
    folder = root / name / f"seed_{seed}"
    inner = folder / "inference" if plan.weights_of else folder
    inner.mkdir(parents=True)
    results = {"AP": ap, "AP50": ap + 20, "AP75": ap + 1}
    if plan.weights_of:
        scores = {"sha256": "0" * 64, "results": {"val": {"segm": results, "bbox": results}}}
        (inner / "scores.json").write_text(json.dumps(scores))
    else:
        flat = {f"{task}/{key}": x for task in ("segm", "bbox") for key, x in results.items()}
        lines = [{"iteration": 19, "total_loss": 1.0}, {"iteration": last - 1, **flat}]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (folder / "model_final.pth").write_bytes(f"{name} {seed}".encode())
    settings = {
        "SOLVER": {"MAX_ITER": 400, "IMS_PER_BATCH": 4},
        "DATASETS": {"TRAIN": ["train"], "TEST": ["val"]},
    }
    (inner / "config.yaml").write_text(yaml.safe_dump(settings))
    record = {
        "name": name,
        "seed": seed,
        "config": plan.config,
        "options": list(plan.options),
        "weights_of": plan.weights_of,
        "commit": "abc1234",
        "cpu_seconds": 120,
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_runs_are_read_with_the_checksums_of_their_files(script, tmp_path):
    folder = make_run(tmp_path, script, "mnc_tiny", 1, 30.0)
    make_run(tmp_path, script, "mnc_tiny_without_voting", 1, 29.0)
    trained, tested = script.collect([tmp_path])
    assert trained["results"]["segm/AP50"] == 50.0
    assert trained["sha256"]["weights"] == hashlib.sha256(b"mnc_tiny 1").hexdigest()
    text = (folder / "metrics.json").read_bytes()
    assert trained["sha256"]["metrics.json"] == hashlib.sha256(text).hexdigest()
    assert tested["results"]["segm/AP"] == 29.0 and tested["sha256"]["weights"] == "0" * 64


def test_runs_of_the_json_file_stay_unless_there_are_newer_ones(script, tmp_path):
    make_run(tmp_path / "old", script, "mnc_tiny", 1, 30.0)
    make_run(tmp_path / "old", script, "mnc_tiny", 2, 31.0)
    make_run(tmp_path / "new", script, "mnc_tiny", 2, 33.0)
    runs = script.collect([tmp_path / "new"], script.collect([tmp_path / "old"]))
    assert script.by_seed(runs, "mnc_tiny", "segm/AP") == {1: 30.0, 2: 33.0}


def test_a_run_that_was_stopped_or_is_of_another_plan_is_refused(script, tmp_path):
    make_run(tmp_path / "a", script, "htc_tiny", 1, 30.0, last=200)
    with pytest.raises(ValueError, match="iteration 199"):
        script.collect([tmp_path / "a"])
    folder = make_run(tmp_path / "b", script, "fcis_tiny_equal", 1, 30.0)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "options": []}))
    with pytest.raises(ValueError, match="fcis_tiny_equal, seed 1"):
        script.collect([tmp_path / "b"])


@pytest.mark.parametrize(
    "ours, theirs, published, expected",
    [
        ([32.0, 33.0, 34.0], [30.0, 31.0, 32.1], 0.7, "same sign"),
        ([30.0, 31.0, 32.0], [32.0, 33.0, 34.1], 0.7, "**other sign**"),
        ([30.0, 33.0, 31.0], [31.0, 30.0, 32.0], 0.7, "not settled"),
        ([30.0], [20.0], 0.7, ""),  # one seed says nothing
    ],
)
def test_an_effect_has_a_sign_only_beyond_two_standard_errors(
    script, ours, theirs, published, expected
):
    runs = [
        {"name": name, "seed": seed, "results": {"segm/AP": value}}
        for name, values in (("a", ours), ("b", theirs))
        for seed, value in enumerate(values)
    ]
    found = script.effect(script.Step("a", "", published, "b"), runs, "segm/AP")
    assert script.verdict(found, published) == expected


def test_the_tables_give_mean_deviation_and_the_published_difference(script, tmp_path):
    for seed, (flow, htc) in enumerate([(33.0, 35.0), (34.0, 36.5), (35.0, 37.0)], 1):
        make_run(tmp_path, script, "htc_tiny_ablation_flow", seed, flow)
        make_run(tmp_path, script, "htc_tiny", seed, htc)
    text = script.measured(script.collect([tmp_path]))
    assert "| `htc_tiny` | 400 | 1, 2, 3 | 36.2 ± 1.0 |" in text
    row = "| semantic branch: HTC | 36.2 ± 1.0 | +2.2 ± 0.2 | 38.0 | +0.6 | same sign |"
    assert row in text
    assert "6 trainings on `train`, tested on `val`, commits `abc1234`" in text


def test_the_page_is_what_the_program_makes_of_the_json_file(script, tmp_path):
    page, kept = tmp_path / "model_zoo.md", script.PAGE.with_suffix(".json")
    page.write_text(script.PAGE.read_text())
    script.put(page, script.measured(json.loads(kept.read_text())))
    assert page.read_text() == script.PAGE.read_text()
