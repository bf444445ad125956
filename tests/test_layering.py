"""Who may import whom, read from the sources and compared with docs/layers.json: no import goes up
or in a circle, and every module can be imported first."""

import ast
import graphlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Rows of names, the users of all others first; drawn in docs/architecture.md.
TABLE = json.loads((ROOT / "docs/layers.json").read_text(encoding="utf-8"))["rows"]
LEVELS = {name: level for level, row in enumerate(reversed(TABLE)) for name in row}
PROJECTS = [path.parent for path in ROOT.glob("projects/*/*/__init__.py")]
PROJECTS = {f"d2ext.projects.{path.name}": path for path in PROJECTS if path.name != "configs"}
SHIPPED = sorted(
    path
    for folder in ("d2ext", "projects", "configs", "tools", "demo", "dev", "examples")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def relative(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    """Dotted name under which a file of a package is imported."""
    for package, folder in {"d2ext": ROOT / "d2ext", **PROJECTS}.items():
        if folder in path.parents:
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def package_of(path):
    """The package that relative imports of a file start from."""
    name = module_name(path) or ""
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def names_in(node, package):
    """Absolute names of what one import statement, or call of `import_module`, imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        texts = [x.value for x in node.args if isinstance(x, ast.Constant)]
        return texts[:1] if name == "import_module" else []
    if not isinstance(node, ast.ImportFrom):
        return []
    base = "." * node.level + (node.module or "")
    if node.level:
        if not package:
            return []  # a config that builds on the file beside it
        base = importlib.util.resolve_name(base, package)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(path):
    """Absolute names of everything that a file imports, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [x for node in ast.walk(tree) for x in names_in(node, package_of(path))]


def runs_at_import(node):
    """Everything below a node but functions and what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runs_at_import(child)


def block(module):
    """The name in the table that a module belongs to; None for what lies outside."""
    parts = module.split(".")
    if project_of(module):
        return "projects"
    name = ".".join(parts[:2]) if parts[0] == "d2ext" else parts[0]
    return name if name in LEVELS else None


def project_of(module):
    """The package of a project that a module belongs to; None for what lies outside."""
    return next((x for x in PROJECTS if f"{module}.".startswith(f"{x}.")), None)


def modules():
    return [path for path in SHIPPED if module_name(path)]


def test_the_table_has_what_is_there_and_nothing_else():
    folders = [p.parent.name for p in ROOT.glob("d2ext/*/__init__.py")]
    folders.remove("projects")  # the door to those in projects/
    files = [p.stem for p in ROOT.glob("d2ext/*.py") if not p.stem.startswith("__")]
    assert len(folders) > 5
    assert {f"d2ext.{name}" for name in folders + files} == {x for x in LEVELS if "." in x}
    assert all((ROOT / name).is_dir() for name in LEVELS if "." not in name)
    assert len(LEVELS) == sum(map(len, TABLE))


def test_modules_import_from_lower_rows_only():
    wrong = []
    for path in modules():
        own = block(module_name(path))
        if own is None:
            continue  # d2ext/__init__.py
        for imported in imports(path):
            other = block(imported)
            if other not in (None, own) and LEVELS[other] >= LEVELS[own]:
                wrong.append(f"{relative(path)} imports {imported}")
    assert wrong == []


def sources():
    """Module -> (its package, its text)."""
    return {module_name(p): (package_of(p), p.read_text(encoding="utf-8")) for p in modules()}


def import_graph(sources, nodes_of):
    """Module -> modules that have to be imported before it, as far as they are ours.

    Importing a.b.c imports a and a.b too; the packages that hold a module are under way already.
    """
    graph = {}
    for name, (package, text) in sources.items():
        wanted = graph[name] = set()
        nodes = nodes_of(ast.parse(text))
        for target in (x for node in nodes for x in names_in(node, package)):
            target = target if target in sources else target.rpartition(".")[0]
            if target in sources and target != name:
                wanted.add(target)
            while target := target.rpartition(".")[0]:
                if target in sources and not name.startswith(f"{target}.") and target != name:
                    wanted.add(target)
    return graph


def circle(graph):
    """One circle of a graph, or []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_module_needs_itself_to_be_imported():
    graph = import_graph(sources(), runs_at_import)
    assert len(graph) > 40 and "d2ext.errors" in graph["d2ext.data.register"]
    assert circle(graph) == []


def test_no_import_inside_a_function_hides_a_circle():
    assert circle(import_graph(sources(), ast.walk)) == []


@pytest.mark.parametrize(
    ("text", "needed", "hidden"),
    [
        ("import p.a", True, True),
        ("from p import a", True, True),
        ("from . import a", True, True),
        ("from .a import x", True, True),
        ("from p.c.d import x", True, True),  # runs p/c/__init__.py, which imports p.a
        ("if x:\n    import p.a", True, True),
        ("class A:\n    import p.a", True, True),
        ("def f():\n    import p.a", False, True),
        ("def f():\n    importlib.import_module('p.a')", False, True),
        ("if TYPE_CHECKING:\n    import p.a", False, True),
        ("import os, p", False, False),
        ("from .b import x", False, False),
    ],
)
def test_circles_would_be_noticed(text, needed, hidden):
    tree = {"p": ("p", ""), "p.a": ("p", "from . import b"), "p.b": ("p", text)}
    tree |= {"p.c": ("p.c", "from ..a import y"), "p.c.d": ("p.c", "")}
    assert bool(circle(import_graph(tree, runs_at_import))) == needed
    assert bool(circle(import_graph(tree, ast.walk))) == hidden


def test_the_shared_package_knows_no_project():
    wrong = [
        f"{relative(path)} imports {imported}"
        for path in modules()
        if not project_of(module_name(path))
        for imported in imports(path)
        if imported.startswith(("d2ext.projects", "projects", "configs"))
    ]
    assert wrong == []


def test_projects_import_neither_each_other_nor_the_engine():
    assert PROJECTS
    wrong = []
    for path in modules():
        own = project_of(module_name(path))
        if own is None:
            continue
        for imported in imports(path):
            if project_of(imported) not in (None, own) or imported.startswith("d2ext.engine"):
                wrong.append(f"{relative(path)} imports {imported}")
    assert wrong == []


def test_operators_do_without_detectron2():
    wrong = [
        f"{relative(path)} imports {imported}"
        for path in modules()
        if block(module_name(path)) == "d2ext.ops"
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
