"""dev/train_zoo.py: run folders that dev/write_model_zoo.py can read, nothing done twice."""

import json

from d2ext.config.find import find_config


def arguments_of(script, *words):
    parser = script.argument_parser()
    return parser.parse_args([str(word) for word in words])


def test_the_plan_names_configs_and_runs_that_exist(script):
    names = [run.name for run in script.RUNS]
    assert len(set(names)) == len(names)
    for run in script.RUNS:
        find_config(run.config)
        assert not run.weights_of or run.weights_of in names
    from zoo_plan import CHAINS

    for chain in CHAINS:
        for step in chain.steps:
            assert step.run in names and (not step.against or step.against in names)


def test_a_stopped_training_is_continued_and_one_that_ended_is_left_alone(script, tmp_path):
    run = script.RUNS[0]
    folder = tmp_path / run.name / "seed_2"
    assert "--resume" not in script.command(run, 2, folder, tmp_path, None)
    folder.mkdir(parents=True)
    assert "--overwrite" in script.command(run, 2, folder, tmp_path, None)
    (folder / "last_checkpoint").write_text("model_0000099.pth")
    words = script.command(run, 2, folder, tmp_path, None)
    assert "--resume" in words and "SEED=2" in words
    (folder / "run.json").write_text("{}")
    assert "is there" in script.carry_out(run, 2, arguments_of(script, tmp_path))


def test_a_training_and_a_test_of_its_weights_leave_what_the_page_is_made_of(script, tmp_path):
    trained = next(run for run in script.RUNS if run.name == "fcis_tiny")
    tested = next(run for run in script.RUNS if run.weights_of == "fcis_tiny")
    arguments = arguments_of(script, tmp_path, "--max-iter", 1)
    for run in (trained, tested):
        said = script.carry_out(run, 1, arguments)
        assert "processor time" in said, (tmp_path / "logs").rglob("*.txt")
    record = json.loads((tmp_path / "fcis_tiny" / "seed_1" / "run.json").read_text())
    assert record["config"] == "fcis_tiny" and record["cpu_seconds"] > 0
    scores = json.loads((tmp_path / tested.name / "seed_1/inference/scores.json").read_text())
    assert set(scores["results"]) == {"shapes_val"} and len(scores["sha256"]) == 64
    assert scores["weights"].endswith("fcis_tiny/seed_1/model_final.pth")
