"""Optional writers, with modules that stand for the packages: nothing is sent anywhere."""

import json
import sys
import types

import pytest

from d2ext.engine import train
from d2ext.errors import UserError


class Stub(types.ModuleType):
    """Either package: keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.sent, self.ended, self.failing = [], [], 0, False

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "run-1",
            log=lambda values, step: self.log_metrics(values, step),
            finish=self.end_run,
        )

    def start_run(self, run_id, run_name):
        self.started.append({"id": run_id, "name": run_name})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "run-1"))

    def log_metrics(self, values, step):
        if self.failing:
            raise ValueError("the service is away")
        self.sent.append((step, dict(values)))

    def end_run(self):
        self.ended += 1


@pytest.fixture(params=["wandb", "mlflow"])
def package(request, monkeypatch):
    stub = Stub(request.param)
    monkeypatch.setitem(sys.modules, request.param, stub)
    return stub


def key(kind, name):
    return {"yaml": f"LOG_WRITERS=[{name}]", "py": f"train.log_writers=[{name}]"}[kind]


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_service_gets_what_metrics_json_gets_and_one_run_when_resumed(
    short_run, tmp_path, package, kind
):
    name = package.__name__
    train(short_run("mask_rcnn", kind, "run", key(kind, name), "train.max_iter=3"))
    assert package.started[0]["id"] is None and package.started[0]["name"] == "run"
    train(short_run("mask_rcnn", kind, "run", key(kind, name), "train.max_iter=5"), resume=True)
    assert package.started[1]["id"] == "run-1" and package.ended == 2
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    written = {line["iteration"]: line for line in map(json.loads, lines)}
    sent = {}
    for step, values in package.sent:
        sent.setdefault(step, {}).update(values)
    assert {0, 1, 2, 3, 4} <= set(sent)
    for step in range(5):
        for metric in ("total_loss", "loss_mask", "lr"):
            assert sent[step][metric] == pytest.approx(written[step][metric], rel=1e-12)


def test_a_service_that_is_away_does_not_end_the_training(short_run, tmp_path, package, caplog):
    package.failing = True
    train(short_run("mask_rcnn", "yaml", "run", key("yaml", package.__name__)))
    assert caplog.text.count("the service is away") == 1 and not package.sent
    assert (tmp_path / "run/model_final.pth").is_file()


def test_a_service_that_refuses_at_the_start_is_one_line(short_run, package, monkeypatch):
    def refuse(**options):
        raise RuntimeError("not\nlogged in")

    monkeypatch.setattr(package, "init", refuse)
    monkeypatch.setattr(package, "start_run", refuse)
    with pytest.raises(UserError, match=r"cannot start a run \(RuntimeError: not logged in\)"):
        train(short_run("mask_rcnn", "yaml", "run", key("yaml", package.__name__)))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_and_an_unknown_name_are_one_line(short_run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"'{name}', whose package is not installed: pip install"):
        train(short_run("mask_rcnn", "yaml", "run", key("yaml", name)))
    with pytest.raises(UserError, match="has 'neptune'; valid names: wandb, mlflow"):
        train(short_run("mask_rcnn", "yaml", "run", key("yaml", "neptune")))
