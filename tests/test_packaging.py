"""Wheel and sdist: what is inside, that an installed copy finds its configs and projects, and that
the sdist has all that the wheel and the extension are built from."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import d2ext

from tests.report.browser import Visit, find_browser, open_browser

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "d2ext", "configs", "projects", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md",
    "LICENSE", "CHANGELOG.md", "CITATION.cff",
)  # fmt: skip
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "output")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=SKIPPED)
        else:
            shutil.copy(ROOT / part, source / part)
    return source


def build(run_python, kind, source, target):
    """What `build_wheel` or `build_sdist` makes of a source folder, without the extension."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    process = run_python("-c", code, cwd=source, D2EXT_BUILD_EXT="0")
    assert process.returncode == 0, process.stderr[-2000:]
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory, run_python):
    """A wheel built from a copy of the sources, without the extension."""
    return build(run_python, "wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tree, tmp_path_factory, run_python):
    """The folder of an unpacked sdist."""
    target = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(run_python, "sdist", tree, target)) as archive:
        archive.extractall(target / "unpacked", filter="data")
    (folder,) = (target / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder, *suffixes):
    paths = (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {
        str(p.relative_to(ROOT / folder)) for p in paths if p.suffix in suffixes or not suffixes
    }


def read(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_every_module_and_every_shared_config_is_inside(files):
    assert {f"d2ext/{name}" for name in sources("d2ext", "*.py")} <= files
    configs = sources("configs")
    assert "common/train.py" in configs and "Base-RCNN-FPN.yaml" in configs
    assert {f"d2ext/configs/{name}" for name in configs} <= files


def test_the_packages_of_the_projects_are_inside(files):
    folders = [path.parent for path in ROOT.glob("projects/*/*/__init__.py")]
    folders = [folder for folder in folders if folder.name != "configs"]
    assert any(folder.name == "htc" for folder in folders)
    for folder in folders:
        place = f"d2ext/projects/{folder.name}"
        assert {f"{place}/{name}" for name in sources(folder, "*.py")} <= files
        configs = sources(folder.parent / "configs", ".py", ".yaml")
        assert {f"{place}/configs/{name}" for name in configs} <= files and configs


def test_nothing_else_is_inside(files):
    tops = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert tops == {"d2ext"}
    assert not any(name.endswith((".so", ".pyc")) or "/csrc/" in name for name in files)


def test_the_templates_of_the_commands_are_inside(files):
    templates = sources("d2ext/report/template")
    assert {"report.html.j2", "style.css", "script.js"} <= templates
    assert {f"d2ext/report/template/{name}" for name in templates} <= files


def test_the_sdist_has_the_sources_of_the_extension(unpacked):
    wanted = sources("d2ext/csrc")
    assert {"checks.h", "cpu/pack.h", "cuda/common.cuh", "cuda/roi_warp.cu"} <= wanted
    folder = unpacked / "d2ext/csrc"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == wanted


def test_the_wheel_of_the_sdist_is_that_of_the_sources(
    unpacked, files, tmp_path_factory, run_python
):
    path = build(run_python, "wheel", unpacked, tmp_path_factory.mktemp("again"))
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == files


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)
def test_the_sdist_compiles_and_runs_in_an_environment_with_torch_alone(
    unpacked, clean_python, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(unpacked, source)
    names = ("PYTHONPATH", "D2EXT_BUILD_EXT", "D2EXT_DISABLE_EXT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"FORCE_CUDA": "0", "D2EXT_CXXFLAGS": "-O1", "MAX_JOBS": "2"}

    def run(*arguments):
        command = [clean_python, *arguments]
        process = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return process.stdout

    pip = ("-m", "pip", "--disable-pip-version-check")
    offline = ("--no-index", "--no-deps")
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path / "wheels", source)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith(f"d2ext-{d2ext.__version__}-cp310-abi3-linux")
    run(*pip, "install", *offline, wheel)
    code = """
        import importlib.util, torch
        import d2ext.ops as ops
        assert importlib.util.find_spec("detectron2") is None
        assert ops.__file__.startswith({root!r}) and ops.has_native()
        box = torch.tensor([[0.0, 0, 0, 3, 3]])
        print(ops.roi_warp(torch.ones(1, 2, 4, 4), box, 2, 1.0).sum().item())
    """
    code = textwrap.dedent(code).replace("{root!r}", repr(str(tmp_path / "clean")))
    assert run("-c", code) == "8.0\n"
    assert "roi_warp" in run("-m", "d2ext.ops")


def test_metadata_name_version_and_projects(wheel):
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("d2ext", d2ext.__version__)
    assert any(line.startswith("torch>=") for line in metadata.get_all("Requires-Dist"))
    entries = configparser.ConfigParser()
    entries.read_string(read(wheel, "entry_points.txt"))
    assert entries["d2ext.projects"]["htc"] == "d2ext.projects.htc"


def test_an_installed_copy_finds_its_configs_and_projects(wheel, run_python, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
        import importlib.metadata, json
        import d2ext, d2ext.projects.htc as htc
        from d2ext.config import find_config, get_config, get_config_file, load_config
        from d2ext.config.load import config_roots
        KINDS = (".yaml", ".py")
        cfg = load_config(get_config_file("mask_rcnn_tiny.yaml"), ["SEED=3"])
        lazy = load_config(get_config_file("mask_rcnn_tiny.py"), ["train.seed=3"])
        print(json.dumps({
            "from": [d2ext.__file__, htc.__file__],
            "roots": [str(root) for root in config_roots()],
            "seeds": [cfg.SEED, lazy.train.seed],
            "period": get_config("common/train.py").train.log_period,
            "kinds": [load_config(find_config(f"htc_tiny{x}")).get("VERSION") for x in KINDS],
            "version": importlib.metadata.version("d2ext"),
        }))
    """
    process = run_python("-W", "ignore", "-c", textwrap.dedent(code), path=[site], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found == {
        "from": [str(site / "d2ext/__init__.py"), str(site / "d2ext/projects/htc/__init__.py")],
        "roots": [str(site / "d2ext/configs")],
        "seeds": [3, 3],
        "period": 20,
        "kinds": [2, None],
        "version": d2ext.__version__,
    }


@pytest.fixture(scope="module")
def environment(wheel, run_python, tmp_path_factory):
    """A virtual environment with the wheel, which sees what else is installed here but d2ext."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    (site,) = folder.glob("lib/python*/site-packages")
    # Files *.pth in these folders, of an editable d2ext among them, are not followed.
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    pip = ["-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index"]
    process = run_python(*pip, "--ignore-installed", wheel)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


@pytest.fixture
def d2ext_command(environment, tmp_path):
    """`d2ext_command(*words)` in an empty folder, as one types it; the output."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words):
        process = subprocess.run(
            [str(environment / "bin/d2ext"), *map(str, words)],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
        return process.stdout

    return run


@pytest.mark.slow
def test_from_an_empty_folder_to_a_report_with_the_wheel_alone(
    d2ext_command, environment, few_images, tmp_path
):
    """info, train in yaml and in lazy form, predict, compare: configs and backbone of the wheel."""
    data = json.loads((few_images / "few.json").read_text())
    data["info"] = {"image_folder": str(few_images / "images")}
    (tmp_path / "mydata").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"mydata/{part}.json").write_text(json.dumps(data))
    assert str(environment.resolve()) in d2ext_command("info")
    common = ["--data", "mydata", "MODEL.DEVICE=cpu", "SOLVER.MAX_ITER=2", "SOLVER.IMS_PER_BATCH=2"]
    d2ext_command("train", "mask_rcnn_tiny", *common, "OUTPUT_DIR=runs/yaml")
    d2ext_command("train", "htc_tiny.py", *common, "OUTPUT_DIR=runs/lazy")
    for kind in ("yaml", "lazy"):
        weights = ["--weights", f"runs/{kind}/model_final.pth", "--input", few_images / "images"]
        d2ext_command("predict", *weights, "--output", f"pictures/{kind}")
        assert len(list((tmp_path / "pictures" / kind).glob("*.png"))) >= 4
    found = ["pictures=pictures/yaml/predictions.json"]
    out = d2ext_command("compare", "runs/yaml", "runs/lazy", *found, "--output", "compared")
    assert "4 images of mydata_val" in out
    numbers = json.loads((tmp_path / "compared/metrics.json").read_text())
    assert list(numbers) == ["yaml", "lazy", "pictures"] and "stage3/segm/AP" in numbers["lazy"]
    page = (tmp_path / "compared/report.html").read_text(encoding="utf-8")
    assert "lazy, stage by stage" in page
    if find_browser():  # the rest of this test is worth having without one
        with open_browser() as browser:
            visit = Visit(browser, tmp_path / "compared/report.html", 400)
            assert (visit.problems, visit.external()) == ([], [])
