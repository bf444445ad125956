"""Projects are found by their entry points, wherever their packages lie."""

import importlib
import logging
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import d2ext.config.projects as projects_module
from d2ext.config import find_config, get_cfg, load_config, load_projects, project_configs
from d2ext.config.projects import with_present_names

from detectron2.config import LazyConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function: a package's name and source -> its folder, on the module search path, with the
    metadata that an installation leaves."""
    monkeypatch.setattr(projects_module, "_CONFIG_FUNCTIONS", [])
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def run(name, source):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[d2ext.projects]\n{name} = {name}\n")
        importlib.invalidate_caches()
        made.append(name)
        return tmp_path / name

    yield run
    for name in made:
        sys.modules.pop(name, None)


def load_anew():
    """What `load_projects` does in a new process."""
    return load_projects.__wrapped__()


def test_any_installed_package_is_a_project(install):
    source = """
        from d2ext.config import register_config
        @register_config
        def add_keys(cfg):
            cfg.MODEL.OUTSIDE_PROJECT = 5
    """
    install("outside_project", "\n".join(line[8:] for line in source.splitlines()))
    assert "outside_project" in load_anew()
    assert get_cfg().MODEL.OUTSIDE_PROJECT == 5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def (", "SyntaxError: invalid syntax"),
        ("raise KeyError('two\\nlines')", "KeyError"),
    ],
)
def test_a_broken_project_is_named_in_one_line_and_the_others_work(install, caplog, source, words):
    install("broken_project", source)
    with caplog.at_level(logging.WARNING, "d2ext"):
        loaded = load_anew()
    assert "broken_project" not in loaded and "htc" in loaded
    (line,) = [m for m in caplog.messages if "broken_project" in m]
    assert words in line and "\n" not in line and "install it again" in line


def test_configs_of_a_project_lie_in_its_package_or_beside_it(install):
    assert project_configs("htc") == ROOT / "projects/HTC/configs"
    folder = install("outside_project", "")
    assert project_configs("outside_project") is None
    (folder.parent / "configs").mkdir()
    assert project_configs("outside_project") == folder.parent / "configs"
    (folder / "configs").mkdir()
    assert project_configs("outside_project") == folder / "configs"
    assert project_configs("no_such_project") is None


def test_a_saved_config_names_projects_as_they_are_called_now():
    saved = (
        "model: {_target_: htc.meta_arch.HybridTaskCascade, x: htc.y}\n"
        "head: {_target_: 'mnc.heads.MNCMaskHead'}\n"
        "f: !!python/name:fcis.sampler.FCISSampler ''\n"
        "mine: {_target_: xhtc.a, y: _target_: torch.nn.ReLU}\n"
    )
    assert with_present_names(saved) == (
        "model: {_target_: d2ext.projects.htc.meta_arch.HybridTaskCascade, x: htc.y}\n"
        "head: {_target_: 'd2ext.projects.mnc.heads.MNCMaskHead'}\n"
        "f: !!python/name:d2ext.projects.fcis.sampler.FCISSampler ''\n"
        "mine: {_target_: xhtc.a, y: _target_: torch.nn.ReLU}\n"
    )


def test_the_names_of_a_package_that_is_installed_stay(install):
    install("moved_project", "")
    assert with_present_names("_target_: moved_project.a") == "_target_: moved_project.a"


def test_a_lazy_config_saved_under_the_old_names_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    LazyConfig.save(load_config(find_config("htc_tiny.py")), str(path))
    new, text = load_config(str(path)), path.read_text()
    assert text.count("d2ext.projects.htc.") >= 3
    path.write_text(text.replace("d2ext.projects.htc.", "htc."))
    assert OmegaConf.to_yaml(load_config(str(path))) == OmegaConf.to_yaml(new)
