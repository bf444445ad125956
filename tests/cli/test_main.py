"""The command `d2ext`: what it knows, and what it says of mistakes."""

import sys

import pytest

from d2ext.cli.main import COMMANDS, STATUSES, main


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["d2ext"])


def test_without_a_command_it_lists_all_of_them(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2


def test_exit_statuses_are_in_the_help_and_in_the_readme(capsys, request):
    main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    for status, text in STATUSES.items():
        assert f" {status} {text}" in words
        assert f"| {status} | {text} |" in readme


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_by_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as ending:
        main([name, "--help"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: d2ext {name} ")


def test_a_misspelt_command_is_one_line_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'trian'" in err and "train" in err


def test_list_names_configs_of_all_projects_with_what_was_published(capsys):
    assert main(["list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"htc_tiny", "mnc_tiny", "fcis_tiny", "mask_rcnn_tiny"} <= set(rows)
    assert "yaml py" in rows["htc_tiny"]
    assert "box AP 42.3, mask AP 37.4" in rows["htc_R_50_FPN_1x_coco"]
    assert main(["list", "htc", "50", "--paths"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert any("projects/HTC/configs/htc_R_50_FPN_1x_coco.yaml" in line for line in lines)
    assert main(["list", "nothing"]) == 1
    assert "'nothing'" in capsys.readouterr().err


def test_info_names_versions_and_what_each_operator_runs_on(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for words in ("detectron2", "torch", "htc", "roi_warp", "GPU"):
        assert words in text
