"""The installer refuses in one line what cannot work, and does nothing when nothing has changed."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools/script.py"


@pytest.mark.parametrize("version", [(3, 9), (3, 13)])
def test_unsupported_python_is_refused_with_the_mend(script, monkeypatch, version, tmp_path):
    monkeypatch.setattr(script.sys, "version_info", (*version, 0))
    with pytest.raises(script.CannotInstall, match="PYTHON=python3.11"):
        script.check_machine(tmp_path / "venv")


def test_full_disk_is_refused_before_anything_is_made(script, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")(100, 99, 2**30)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(script.CannotInstall, match="1.0 GiB free.*VENV="):
        script.check_machine(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_folder_that_is_no_environment_is_left_alone(script, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/thesis.tex").write_text("mine")
    with pytest.raises(script.CannotInstall, match="not a virtual environment"):
        script.check_machine(tmp_path / "venv")


def test_second_call_is_a_no_op_until_the_requirements_change(script, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / ".d2ext-installed").write_text(script.fingerprint())
    calls = []
    monkeypatch.setattr(script, "install", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(sys, "argv", ["script.py", "--venv", str(tmp_path)])
    assert script.main() == 0 and not calls
    monkeypatch.setenv("D2EXT_BUILD_EXT", "0")
    assert script.main() == 0 and len(calls) == 1


def test_requirements_pin_every_version():
    for name in ("base", "build", "dev", "detectron2"):
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
            assert line.startswith("#") or "==" in line, f"{name}.txt: {line}"


def test_make_help_lists_the_targets():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("install", "demo", "test", "lint", "clean"):
        assert f"\n{target} " in "\n" + text.stdout


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like detectron2's sources, with a commit."""
    for name in ("setup.py", "detectron2/__init__.py", ".git/HEAD"):
        (tmp_path / "d2" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d2" / name).write_text(name)
    return tmp_path / "d2"


def test_a_checkout_of_detectron2_is_installed_from_a_copy(script, checkout, monkeypatch, tmp_path):
    installed = []

    def run(*command, **environment):
        (copy,) = (part for part in command if isinstance(part, Path) and part.name == "detectron2")
        installed.append(sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*.*")))
        (copy / "written").touch()
        assert "--no-deps" in command and environment == {}  # compiled as its authors do

    monkeypatch.setattr(script, "run", run)
    script.install_detectron2(Path(sys.executable), checkout)  # which has detectron2 already
    assert installed == [["detectron2/__init__.py", "setup.py"]]
    assert not (checkout / "written").exists()
    script.install_detectron2(Path(sys.executable), None)
    assert len(installed) == 1


def test_another_state_of_the_checkout_is_another_installation(script, checkout):
    before = script.fingerprint(checkout)
    assert before == script.fingerprint(checkout) != script.fingerprint()
    (checkout / "detectron2/__init__.py").write_text("changed")
    assert script.fingerprint(checkout) != before


def test_a_folder_without_detectron2_is_refused(script, checkout, monkeypatch, capsys, tmp_path):
    (checkout / "setup.py").unlink()
    arguments = ["--venv", str(tmp_path / "venv"), "--detectron2", str(checkout)]
    monkeypatch.setattr(sys, "argv", ["setup_environment.py", *arguments])
    assert script.main() == 1
    assert "is no checkout of detectron2: it has no setup.py" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()
