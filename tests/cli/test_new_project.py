"""A new project: it can be installed, its tests pass, it trains; and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project(script, tmp_path_factory):
    """Folder of a new project."""
    into = tmp_path_factory.mktemp("new") / "not yet there"
    assert script.main(["my_new_network", "--into", str(into)]) == 0
    return into / "my_new_network"


@pytest.fixture(scope="module")
def site(project, installed):
    return installed(project)


def test_every_file_is_filled_in_and_in_the_style_of_the_repository(project):
    paths = [path for path in project.rglob("*") if path.is_file()]
    assert len(paths) == 9 and not any("NAME" in path.name for path in paths)
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert "my_new_network" in text or "MyNewNetwork" in text
        assert "{{" not in text and "{%" not in text
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), str(project)]
    # The order of imports depends on the name.
    for words in (["check", "--ignore", "I001"], ["format", "--check"]):
        result = subprocess.run([*ruff, *words, *config], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_its_tests_pass_once_it_is_installed(project, site, run_python, tmp_path):
    shutil.copytree(project / "tests", tmp_path / "tests")  # away from the sources
    process = run_python(
        "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, path=[site]
    )
    assert process.returncode == 0, process.stdout
    assert "6 passed" in process.stdout


def test_the_tools_find_it_and_train_it(site, run_scripts, register_argument, tmp_path):
    words = ["--register", register_argument, "DATASETS.TRAIN=few", "DATASETS.TEST=[]"]
    words += ["SOLVER.IMS_PER_BATCH=2", "SOLVER.MAX_ITER=2"]
    commands = []
    for kind in ("yaml", "py"):
        config = site / f"my_new_network/configs/my_new_network_tiny.{kind}"
        output = f"OUTPUT_DIR={tmp_path / kind}"
        commands.append(["tools/train_net.py", "--config-file", config, *words, output])
    run_scripts(*commands, path=[site])
    for kind in ("yaml", "py"):
        assert (tmp_path / kind / "model_final.pth").is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "cannot be that of a package"),
        ("My-Network", "cannot be that of a package"),
        ("../net", "cannot be that of a package"),
        ("2nets", "cannot be that of a package"),
        ("lambda", "cannot be that of a package"),
        ("json", "a module of this name"),
        ("htc", "a yaml key MODEL.HTC"),
        ("tests", "a module of this name"),
        ("rpn", "a yaml key MODEL.RPN"),
        ("retina_net", "a registered class RetinaNet"),
        ("cascade", "a registered class CascadeROIHeads"),
    ],
)
def test_a_name_that_is_none_or_is_taken_is_refused_in_one_line(
    script, tmp_path, capsys, name, words
):
    assert script.main([name, "--into", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: NAME '{name}'") and words in line
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_left_alone(script, project, capsys):
    before = {p: p.stat().st_mtime_ns for p in project.rglob("*")}
    assert script.main([project.name, "--into", str(project.parent)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {project} exists already")
    assert {p: p.stat().st_mtime_ns for p in project.rglob("*")} == before


def test_a_place_that_cannot_be_written_to_is_named(script, capsys):
    assert script.main(["my_new_network", "--into", "/dev/null"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write /dev/null/my_new_network: Not a directory")
