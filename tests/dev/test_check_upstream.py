"""dev/check_upstream.sh: what it refuses, and what it asks of the installer."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check_upstream(*arguments, cwd, **environment):
    command = [str(ROOT / "dev/check_upstream.sh"), *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like detectron2's sources."""
    (tmp_path / "d2/detectron2").mkdir(parents=True)
    (tmp_path / "d2/setup.py").touch()
    (tmp_path / "d2/detectron2/__init__.py").touch()
    return tmp_path / "d2"


def test_a_missing_or_wrong_folder_is_refused_in_one_line(checkout, tmp_path):
    (checkout / "setup.py").unlink()
    for arguments in ([], ["gone"], ["d2"], ["--help"]):
        process = check_upstream(*arguments, cwd=tmp_path)
        assert process.returncode == 2 and process.stdout == ""
        assert process.stderr.startswith("check_upstream: ") and process.stderr.count("\n") == 1
        assert "checkout of detectron2" in process.stderr


def test_the_installer_gets_the_checkout_and_its_failure_ends_the_check(checkout, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" > "$ASKED"\nexit 7\n')
    python.chmod(0o755)
    asked = tmp_path / "asked"
    process = check_upstream(
        *("d2", "tests/compat"),
        **{"cwd": tmp_path, "PYTHON": str(python), "ASKED": str(asked), "VENV": "elsewhere"},
    )
    assert process.returncode == 7 and "passed" not in process.stdout
    words = ["tools/setup_environment.py", "--venv", "elsewhere", "--detectron2", str(checkout)]
    assert asked.read_text().split() == words
