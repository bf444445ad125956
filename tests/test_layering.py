"""Who may import whom, read from the sources, and that every module can be imported first."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A package may import those of lower levels only.
LEVELS = {
    "compat": 0,
    "errors": 0,
    "version": 0,
    "ops": 1,
    "structures": 2,
    "modeling": 3,
    "solver": 3,
    "config": 3,
    "data": 4,
    "checkpoint": 4,
    "visualization": 4,
    "utils": 4,
    "evaluation": 5,
    "model_zoo": 5,
    "engine": 6,
}
PROJECTS = {path.parent.name: path.parent for path in ROOT.glob("projects/*/*/__init__.py")}
PROJECTS = {name: path for name, path in PROJECTS.items() if name != "configs"}
SHIPPED = sorted(
    path
    for folder in ("d2ext", "projects", "configs", "tools", "demo")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def relative(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    """Dotted name under which a file of a package is imported."""
    for package, folder in {"d2ext": ROOT / "d2ext", **PROJECTS}.items():
        if folder in path.parents:
            parts = path.relative_to(folder.parent).with_suffix("").parts
            assert parts[0] == package
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def imports(path):
    """Absolute names of everything that a file imports, also inside functions."""
    name = module_name(path)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                if name is None:
                    continue  # a config that builds on the file beside it
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(package + ([node.module] if node.module else []))
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def layer(module):
    """Second part of a name below d2ext, and its level."""
    part = (module.split(".") + [""])[1]
    return part, LEVELS.get(part)


def modules():
    return [path for path in SHIPPED if module_name(path)]


def test_every_package_has_a_level():
    folders = [p.parent.name for p in ROOT.glob("d2ext/*/__init__.py")]
    files = [p.stem for p in ROOT.glob("d2ext/*.py") if p.stem != "__init__"]
    assert len(folders) > 5
    assert set(folders + files) <= set(LEVELS)


def test_packages_import_from_lower_levels_only():
    wrong = []
    for path in modules():
        own, level = layer(module_name(path))
        if not module_name(path).startswith("d2ext."):
            continue
        for imported in imports(path):
            other, other_level = layer(imported)
            if imported.split(".")[0] != "d2ext" or other == own or other_level is None:
                continue
            if other_level >= level:
                wrong.append(f"{relative(path)} imports {imported}")
    assert wrong == []


def test_the_shared_package_knows_no_project():
    wrong = [
        f"{relative(path)} imports {imported}"
        for path in modules()
        if module_name(path).startswith("d2ext")
        for imported in imports(path)
        if imported.split(".")[0] in (*PROJECTS, "projects", "configs")
    ]
    assert wrong == []


def test_projects_import_neither_each_other_nor_the_engine():
    assert PROJECTS
    wrong = []
    for path in modules():
        own = module_name(path).split(".")[0]
        if own == "d2ext":
            continue
        for imported in imports(path):
            top = imported.split(".")[0]
            if (top in PROJECTS and top != own) or imported.startswith("d2ext.engine"):
                wrong.append(f"{relative(path)} imports {imported}")
    assert wrong == []


def test_operators_do_without_detectron2():
    wrong = [
        f"{relative(path)} imports {imported}"
        for path in modules()
        if layer(module_name(path))[0] == "ops"
        for imported in imports(path)
        if imported.split(".")[0] == "detectron2"
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["d2ext", *PROJECTS])
def test_a_package_adapts_detectron2_before_anything_else(package):
    folder = PROJECTS.get(package, ROOT / package)
    first = imports(folder / "__init__.py")[0]
    assert first == "d2ext.compat" if package == "d2ext" else first.split(".")[0] == "d2ext"


def test_no_source_uses_what_breaks_elsewhere():
    """Module search path, names of detectron2 that need files it does not install, local paths."""
    wrong = []
    for path in SHIPPED:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [
            f"{relative(path)} imports {name}"
            for name in imports(path)
            if name.startswith(("detectron2.model_zoo", "pkg_resources"))
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "path":
                if isinstance(node.value, ast.Name) and node.value.id == "sys":
                    wrong.append(f"{relative(path)}:{node.lineno} uses sys.path")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.match(r"/(work|home|root|Users|mnt|tmp)(/|$)", node.value):
                    wrong.append(f"{relative(path)}:{node.lineno} holds the path {node.value}")
    assert wrong == []


IMPORT_EACH = """
import json, os, sys
import torch, d2ext
import detectron2.engine, detectron2.evaluation, detectron2.modeling, detectron2.utils.visualizer
failed = []
for name in json.loads(sys.argv[1]):
    child = os.fork()  # what was imported above is there already; nothing else of d2ext is
    if child == 0:
        code = 1
        try:
            __import__(name)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(json.dumps(failed))
"""


def test_every_module_can_be_the_first_one_that_is_imported(run_python):
    names = [module_name(path) for path in modules()]
    assert len(names) > 40
    process = run_python("-W", "ignore", "-c", IMPORT_EACH, json.dumps(names))
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == []
