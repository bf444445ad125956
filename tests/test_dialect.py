"""The conventions of CONTRIBUTING that ruff does not check, read from the sources."""

import ast
import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "d2ext", "demo", "dev", "examples", "projects", "tools")
SOURCES = sorted(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
PROPER_NAMES = {"Mask", "Python"}
# Errors that become one line for the user.
ERRORS = {"UserError", "FormatError", "CannotInstall"}


def where(path, node):
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def docstrings():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
                yield path, node, ast.get_docstring(node, clean=False)


def sentence(node):
    """The text of an error's first argument; `{}` stands for what is filled in."""
    argument = node.args[0]
    if isinstance(argument, ast.Constant):
        return argument.value if isinstance(argument.value, str) else None
    if isinstance(argument, ast.JoinedStr):
        return "".join(x.value if isinstance(x, ast.Constant) else "{}" for x in argument.values)
    return None


def errors():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
                if sentence(node):
                    yield path, node, sentence(node)


def test_sentences_of_errors_have_no_capital_no_full_stop_and_one_line():
    found = list(errors())
    assert len(found) > 150
    wrong = []
    for path, node, text in found:
        first = text.split()[0]
        capital = re.fullmatch(r"[A-Z][a-z-]+", first) and first not in PROPER_NAMES
        full_stop = text.rstrip().endswith(".") and not text.rstrip().endswith("...")
        if capital or full_stop or "\n" in text:
            wrong.append(f"{where(path, node)}: {text}")
    assert wrong == []


def test_docstrings_have_plain_backticks_and_leave_types_to_annotations():
    typed = re.compile(r"(?m)^\s*\w+ \((?:int|float|bool|str|Tensor|dict|list|tuple)[^)]*\):")
    wrong = [
        where(path, node)
        for path, node, text in docstrings()
        if "``" in text or re.search(r":(?:func|class|meth|mod|data|attr):`", text)
        or typed.search(text)
    ]  # fmt: skip
    assert wrong == []


def test_only_packages_list_their_public_names():
    wrong = [
        where(path, node)
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        and path.name != "__init__.py"
    ]  # fmt: skip
    assert wrong == []


def test_no_two_public_functions_of_one_name_take_other_arguments():
    found = defaultdict(dict)
    for path, tree in TREES.items():
        folder = path.relative_to(ROOT)
        if folder.parts[0] not in ("d2ext", "projects") or "configs" in folder.parts:
            continue
        if folder.parts[:2] == ("d2ext", "cli"):
            continue  # programs
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                # The PyTorch implementations are called as the operators are; programs have main().
                if folder.parts[:3] != ("d2ext", "ops", "reference") and node.name != "main":
                    found[node.name][where(path, node)] = ast.unparse(node.args)
    assert len(found) > 200
    wrong = {name: places for name, places in found.items() if len(set(places.values())) > 1}
    assert wrong == {}


def test_no_text_tells_how_the_code_came_about():
    """Reasons and rules belong here; the history is git's."""
    pattern = re.compile(r"(?i)\b(was|were) seen to\b|\bas we know it\b")
    pages = [*SOURCES, *ROOT.glob("docs/*.md"), *ROOT.glob("projects/*/README.md")]
    wrong = [str(p.relative_to(ROOT)) for p in pages if pattern.search(p.read_text())]
    assert wrong == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_holds_and_is_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    if text.strip():
        assert inspect.cleandoc(ast.get_docstring(TREES[path]) or ""), "no docstring"
