"""dev/compare_backbones.py: both trainings of a network take the same time; the table."""

import json

import pytest


@pytest.fixture
def trainings(script, tmp_path, monkeypatch):
    """Trainings that are told instead of done: config, options, test set."""
    found = []

    def measure(config, options, train, test=""):
        (tmp_path / "run").mkdir(exist_ok=True)
        output = dict(option.split("=", 1) for option in options)["OUTPUT_DIR"]
        (tmp_path / "run" / output.rpartition("/")[2]).mkdir()
        found.append((config, [o for o in options if "DIR" not in o and "LOG" not in o], test))
        steps = next((int(o.rpartition("=")[2]) for o in options if "MAX_ITER" in o), 900)
        each = 0.3 if "convnext" in config else 0.2
        late = 0.25 * max(steps - 1080, 0) if config == "fcis_tiny" else 0  # beyond the pilots
        return {
            "seconds": 7 + each * steps + late,
            "AP": 20.0,
            "AP50": 40.0,
            "SOLVER.MAX_ITER": steps,
        }

    monkeypatch.setattr(script, "measure", measure)
    return found


def test_the_slim_resnet_trains_for_the_time_of_the_other(script, tmp_path, trainings):
    script.compare(tmp_path, "HTC", 3)
    assert [config for config, *_ in trainings] == [
        *["htc_tiny_convnext"] * 2,
        *["htc_tiny"] * 2,
        *["htc_tiny_convnext", "htc_tiny"],
    ]
    assert [test for *_, test in trainings] == [*[""] * 4, "shapes_val", "shapes_val"]
    assert trainings[4][1] == ["SEED=3"]
    assert trainings[5][1] == [*script.RANDOM, "SEED=3", "SOLVER.MAX_ITER=1350"]
    kept = json.loads((tmp_path / "HTC, slim ResNet, seed 3.json").read_text())
    assert kept["SOLVER.MAX_ITER"] == 1350
    script.compare(tmp_path, "HTC", 3)
    assert len(trainings) == 6  # nothing is done twice


def test_what_took_another_time_is_done_again_with_another_length(script, tmp_path, trainings):
    script.compare(tmp_path, "FCIS", 1)
    first, second = (options[-1] for _, options, _ in trainings[-2:])
    assert first == "SOLVER.MAX_ITER=1350"
    assert second == f"SOLVER.MAX_ITER={round(1350 * 277 / (277 + 67.5))}"
    kept = json.loads((tmp_path / "FCIS, slim ResNet, seed 1.json").read_text())
    assert f"SOLVER.MAX_ITER={kept['SOLVER.MAX_ITER']}" == second
    script.compare(tmp_path, "FCIS", 1)
    assert len(trainings) == 7


def test_the_table_has_means_over_seeds_and_misses_nothing(script, tmp_path):
    for title in script.NETWORKS:
        for backbone in (script.OTHER, script.OWN):
            for seed, ap in ((1, 20.0), (2, 21.0)):
                numbers = {"seconds": 100.4, "AP": ap, "AP50": 40.0, "SOLVER.MAX_ITER": 900}
                path = tmp_path / f"{title}, {backbone}, seed {seed}.json"
                path.write_text(json.dumps(numbers))
    rows = [line.strip("| ") for line in script.table(tmp_path).splitlines()[2:]]
    assert len(rows) == 8
    assert [x.strip() for x in rows[0].split("|")] == [
        *("MNC", "ConvNeXt-Atto", "900", "100", "20.5", "40.0", "2")
    ]
    path.unlink()
    path.with_name(path.name.replace("seed 2", "seed 1")).unlink()
    with pytest.raises(SystemExit, match="no training of HTC over slim ResNet"):
        script.table(tmp_path)
