"""dev/benchmark_models.py on tiny networks and images."""

import json

import pytest
import torch
from torch import nn


def test_report_holds_all_parts_of_all_networks(script, tmp_path, capsys):
    arguments = ["--tiny", "--models", "mask_rcnn,htc,mnc,fcis", "--size", "64,96"]
    output = str(tmp_path / "report")
    arguments += ["--tasks", "inference,training,paste", "--output", output]
    assert script.main([*arguments, "--note", "a quiet machine"]) == 0
    with open(f"{output}.json") as file:
        report = json.load(file)
    assert report["machine"][-1] == "a quiet machine"
    tables = report["tables"]
    assert [r["network"] for r in tables["inference"]] == ["mask_rcnn", "htc", "mnc", "fcis"]
    for row in tables["inference"] + tables["training"]:
        parts = [v for k, v in row.items() if k.endswith(" ms") and k != "floor ms"]
        assert sum(parts) == pytest.approx(row["ms"], rel=0.01) and min(parts) >= 0
        assert row["GFLOP"] > 0 and row["MB"] > 0 and row["floor ms"] > 0
        assert all(row[f"{part} ms"] > 0 for part in ("backbone", "RPN", "heads", "other"))
    assert all(row["backward ms"] > 0 for row in tables["training"])
    assert {r["by"] for r in tables["paste"]} == {"detectron2", "ours"}
    text = (tmp_path / "report.md").read_text()
    assert "| inference | htc" in text and "a quiet machine" in text
    assert "| paste" in capsys.readouterr().out


def test_mappers_of_the_report_load_the_same_image(script, tmp_path):
    runs = script.mapper_cases.runs(str(tmp_path), 5)
    sizes = {name: run()["image"].shape for name, run in runs.items()}
    assert set(sizes.values()) == {(3, 800, 1067)} and script.mapper_cases.BASE in sizes


def test_mappers_of_the_report_also_run_in_loading_processes(script):
    times = script.mapper_cases.in_a_loading_process(
        {"own": torch.utils.data.get_worker_info}, 1, 3
    )
    assert times.keys() == {"own"} and times["own"] > 0


def test_unknown_names_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--models", "htc,yolo"])
    assert "unknown: yolo" in capsys.readouterr().err


def test_work_of_layers_is_counted(script):
    layer = nn.Linear(30, 20, bias=False)
    x = torch.zeros(7, 30)
    gflop, megabytes = script.count_work(nn.Sequential(layer), lambda: layer(x))
    assert gflop == 2 * 7 * 30 * 20 / 1e9
    assert megabytes == 4 * (7 * 30 + 7 * 20 + 30 * 20) / 1e6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(1, 1, 1)
        self.proposal_generator = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
        self.roi_heads = nn.ModuleDict({"box_pooler": nn.AvgPool2d(1), "box_head": nn.Linear(1, 1)})

    def forward(self, x):
        self.proposal_generator(self.backbone(x))
        self.roi_heads["box_head"](self.roi_heads["box_pooler"](x))


def test_time_inside_a_part_belongs_to_it_alone(script, monkeypatch):
    """The clock ticks at every look: a module takes one, two around another one take two."""
    net = Net()
    timer = script.PartTimer(net, torch.device("cpu"))
    clock = iter(range(100))
    monkeypatch.setattr(timer, "_now", lambda: next(clock))
    whole, parts = timer.run(lambda: net(torch.zeros(1, 1, 1, 1)))
    assert parts == {"backbone": 1, "RPN": 3, "pooling": 1, "heads": 1, "other": whole - 6}
    assert whole == 11
