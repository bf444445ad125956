"""The READMEs and the pages in docs/ against the repository: every file, make target, option,
override key, import and link that they name exists. Nothing is trained here."""

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from d2ext.cli.main import COMMANDS
from d2ext.cli.main import main as d2ext_main
from d2ext.config import find_config, get_cfg, load_config, load_projects
from d2ext.config.overrides import LAZY_TO_YAML

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(p.relative_to(ROOT))
    for p in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("projects/*.md"),
        *ROOT.glob("projects/*/README.md"),
        *ROOT.glob("examples/*/README.md"),
    )
)
HTC_README = "projects/HTC/README.md"
# What the reader brings, and what the commands before have made.
READERS_FILES = ("mydata/", "photo.jpg", "my_htc.", "output/", ".venv/", "datasets/")
_PATH = re.compile(r"[\w.\-]+(/[\w.\-*]*)+|[\w\-]+\.(py|ya?ml|md|json|jpg|png|pth|pkl)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return [text for name, text in _FENCE.findall(read(page)) if name == language]


def commands(page):
    """Words of every command in the page's bash blocks."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [w for w in words if w]


def cases(of):
    return [
        pytest.param(page, x, id=f"{page}-{i}") for page in PAGES for i, x in enumerate(of(page))
    ]


def is_readers(path):
    return path.startswith(READERS_FILES)


def looks_like_path(word):
    return _PATH.fullmatch(word) is not None


def make_targets():
    return set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))


def make_variables():
    return set(re.findall(r"^([A-Z_]+)\s*[?:]?=", read("Makefile"), re.MULTILINE))


@pytest.fixture(scope="module", autouse=True)
def examples():
    """The packages of the examples, which are not installed, make their keys known."""
    for path in ROOT.glob("examples/*/*/__init__.py"):
        importlib.import_module(path.parent.name)


@cache
def help_text(script):
    """What `python script --help` prints."""
    printed = io.StringIO()
    if script.startswith("d2ext "):
        with pytest.raises(SystemExit) as ending, contextlib.redirect_stdout(printed):
            d2ext_main([script.partition(" ")[2], "--help"])
        assert not ending.value.code
        return printed.getvalue()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend((ROOT / script).parent)  # as Python does for a script
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ending.value.code
    return printed.getvalue()


def check_make(words):
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            assert name in make_variables(), f"the Makefile has no variable {name}"
        else:
            assert name in make_targets(), f"the Makefile has no target {name}"
        if name == "ARGS" and words[0] == "demo":
            check_options("demo/run_demo.py", shlex.split(value))


def check_options(script, words):
    for word in words:
        if word.startswith("--"):
            option = re.escape(word.partition("=")[0])
            assert re.search(rf"{option}(?![\w-])", help_text(script)), f"{script} has no {word}"


def check_script(script, words):
    assert (ROOT / script).is_file(), f"there is no {script}"
    check_options(script, words)
    if "--config-file" in words:
        config = words[words.index("--config-file") + 1]
        if not is_readers(config):
            overrides = [w for w in words if re.match(r"\+?[A-Za-z][\w.]*\.[\w.]+=|[A-Z_]+=", w)]
            load_config(ROOT / config, overrides)  # raises for unknown keys and wrong types


def check_d2ext(name, *words):
    """A line such as `d2ext train htc_tiny --data shapes`."""
    assert name in (*COMMANDS, "--help"), f"d2ext has no command {name}"
    if name == "--help":
        return
    check_options(f"d2ext {name}", words)
    if name in ("train", "eval"):
        config = next(w for w in words if not w.startswith("-"))
        overrides = [w for w in words if re.match(r"\+?[A-Za-z][\w.]*\.[\w.]+=|[A-Z_]+=", w)]
        if not is_readers(config):
            load_config(find_config(config), overrides)


def check_command(words):
    program, *words = words
    if program == "make":
        check_make(words)
    elif program in ("python", "torchrun"):
        script = next(i for i, w in enumerate(words) if not w.startswith("--"))
        if words[script] == "-m":
            check_command(words[script + 1 :])
        else:
            check_script(words[script], words[script + 1 :])
    elif program == "d2ext":
        check_d2ext(*words)
    else:
        assert program in ("pip", "source"), f"unknown program {program}"
    for word in words:
        for path in re.split(r"[=,]", word):
            if looks_like_path(path) and not is_readers(path):
                assert (ROOT / path).exists(), f"there is no {path}"


@pytest.mark.parametrize(("page", "words"), cases(commands))
def test_commands_name_existing_files_targets_options_and_keys(page, words):
    check_command(words)


def output_folder(words):
    """Where a training command writes."""
    first = words.index("--config-file") if "--config-file" in words else words.index("train")
    config = words[first + 1]
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in ("OUTPUT_DIR", "train.output_dir"):
            return Path(value)
    if is_readers(config):
        return Path(config)
    cfg = load_config(find_config(ROOT / config if "/" in config else config))
    return Path(cfg.train.output_dir if config.endswith(".py") else cfg.OUTPUT_DIR)


@pytest.mark.parametrize("page", PAGES)
def test_no_training_of_a_page_is_refused_because_of_one_before(page):
    used = set()
    for words in commands(page):
        trains = words[:2] == ["d2ext", "train"] or any(w.endswith("train_net.py") for w in words)
        if not trains or {"--resume", "--overwrite", "--eval-only"} & set(words):
            continue
        folder = output_folder(words)
        assert folder not in used, f"{page}: {' '.join(words)} finds a run in {folder}"
        used.add(folder)


@pytest.mark.parametrize(
    "command",
    [
        "make nonsense",
        "make test NONSENSE=1",
        "d2ext nonsense",
        "d2ext train htc_tiny --nonsense",
        "d2ext train htc_nonsense",
        "d2ext train htc_tiny MODEL.HTC.NONSENSE=1",
        "python projects/HTC/nonsense.py",
        "python projects/HTC/train_net.py --nonsense",
        "python tools/evaluate_stages.py --weight model.pth",
        "python projects/HTC/train_net.py --config-file projects/HTC/configs/nonsense.py",
        "python projects/HTC/train_net.py --config-file configs/mask_rcnn_tiny.py train.nonsense=1",
        "python projects/HTC/train_net.py --config-file configs/mask_rcnn_tiny.yaml NONSENSE=1",
        "python projects/HTC/train_net.py --config-file configs/mask_rcnn_tiny.yaml SEED=one",
        "python demo/demo.py --input nonsense.jpg",
        "python demo/demo.py --input docs/images/nonsense.png",
        'make demo ARGS="--nonsense"',
        "nonsense",
    ],
)
def test_wrong_commands_would_be_noticed(command):
    with pytest.raises(Exception):  # noqa: B017  of any kind, so that the test above fails
        check_command(shlex.split(command))


def python_blocks(page):
    return blocks(page, "python")


@pytest.mark.parametrize(("page", "source"), cases(python_blocks))
def test_python_blocks_compile_import_and_name_existing_files(page, source):
    load_projects()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = node.value.removeprefix("./")
            if looks_like_path(path) and not is_readers(path):
                assert (ROOT / path).exists(), f"there is no {path}"


def own_configs(page):
    return [("py", x) for x in python_blocks(page) if "_htc" in x and "dataloader." in x] + [
        ("yaml", x) for x in blocks(page, "yaml")
    ]


@pytest.mark.parametrize(("page", "config"), cases(own_configs))
def test_config_blocks_load(page, config, tmp_path, monkeypatch):
    suffix, text = config
    monkeypatch.chdir(ROOT)
    text = text.replace('_BASE_: "', f'_BASE_: "{ROOT}/')  # the file lies elsewhere
    (tmp_path / f"my_htc.{suffix}").write_text(text, encoding="utf-8")
    cfg = load_config(tmp_path / f"my_htc.{suffix}")
    iterations = cfg.SOLVER.MAX_ITER if suffix == "yaml" else cfg.train.max_iter
    assert iterations == 1000


def test_own_configs_are_shown_in_both_kinds():
    assert [kind for page in PAGES for kind, _ in own_configs(page)] == ["py", "yaml"]


def slug(heading):
    """GitHub's anchor of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def links(page):
    text = _FENCE.sub("", read(page))
    return [x for x in _LINK.findall(text) if not x.startswith(("http://", "https://"))]


@pytest.mark.parametrize(("page", "link"), cases(links))
def test_local_links_resolve(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists(), f"{page} links to {link}, which does not exist"
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [slug(h) for h in headings]


@pytest.mark.parametrize(("page", "link"), cases(links))
def test_pages_are_about_what_links_to_them_promise(page, link):
    text = _FENCE.sub("", read(page))
    target = ((ROOT / page).parent / link.partition("#")[0]) if link[0] != "#" else ROOT / page
    if target.suffix != ".md":
        return
    content = target.read_text(encoding="utf-8")
    for label in re.findall(rf"\[([^\]]+)\]\({re.escape(link)}\)", text):
        missing = [x for x in re.findall(r"\b[A-Z]{3,}\b", label) if x not in content]
        assert not missing, f"{page} links '{label}' to {link}, which says nothing about {missing}"


@pytest.mark.parametrize("project", ["MNC", "FCIS", "HTC"])
def test_readmes_say_where_local_weights_come_from_and_deny_no_importer(project):
    folder = ROOT / "projects" / project
    text = read(f"projects/{project}/README.md")
    configs = "\n".join(p.read_text() for p in folder.glob("configs/*.yaml"))
    for path in set(re.findall(r'WEIGHTS: "(weights/[^"]+)"', configs)):
        assert f"`{path}`" in text, f"{project}'s configs need {path}, its README does not name it"
    if list(folder.glob("*/importer.py")):
        assert "docs/checkpoints.md" in text
        assert not re.search(r"not part of this release|cannot be loaded|converted by hand", text)


def named_paths(page):
    """Paths of the repository in running text; those of a made-up `x` are left out."""
    folders = "configs|d2ext|demo|dev|docs|projects|requirements|tests|tools"
    words = re.findall(r"`([^`\n]+)`", _FENCE.sub("", read(page)))
    found = [x for w in words for x in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./<-]+", w)]
    return [x for x in dict.fromkeys(found) if not re.search(r"\b(test_)?[xX]\b|<", x)]


@pytest.mark.parametrize(("page", "path"), cases(named_paths))
def test_paths_in_running_text_exist(page, path):
    assert (ROOT / path).exists(), f"{page} names {path}, which does not exist"


def rows(page):
    return [line for line in read(page).splitlines() if line.startswith("|")]


@pytest.mark.parametrize("project", ["MNC", "FCIS", "HTC"])
def test_every_config_of_a_project_is_listed(project):
    folder, name = ROOT / "projects" / project / "configs", project.lower()
    names = {p.stem for p in folder.glob("*.*") if not p.stem.startswith("Base-")}
    text = "\n".join(rows(f"projects/{project}/README.md"))
    assert names and names == set(re.findall(rf"`({name}_\w+)`", text))


def test_every_shared_config_is_listed():
    names = {p.stem for p in (ROOT / "configs").glob("*_*.yaml")}
    assert names == set(re.findall(r"^\| `(\w+rcnn\w+)` ", read("docs/configs.md"), re.MULTILINE))


def published_configs():
    found = []
    for path in sorted((ROOT / "projects/HTC/configs").glob("*.yaml")):
        numbers = re.search(r"box AP ([\d.]+), mask AP ([\d.]+)", path.read_text(encoding="utf-8"))
        if numbers:
            found.append((path.stem, *(n.rstrip(".") for n in numbers.groups())))
    return found


@pytest.mark.parametrize(("name", "box", "mask"), published_configs())
def test_published_numbers_are_those_of_the_configs(name, box, mask):
    (row,) = [r for r in rows(HTC_README) if r.startswith(f"| `{name}` |")]
    numbers = re.findall(r"\d\d\.\d", row)
    assert numbers == [box, mask]
    lazy = (ROOT / f"projects/HTC/configs/{name}.py").read_text(encoding="utf-8")
    assert f"box AP {box}, mask AP {mask}" in lazy


def test_switches_of_htc_exist_in_both_kinds_of_config():
    load_projects()
    section = read(HTC_README).partition("## Switches")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([A-Z_.]+)` \| (.*?) \|", section, re.MULTILINE)
    assert len(found) >= 8
    yaml_cfg = get_cfg().MODEL.HTC
    lazy_cfg = load_config(ROOT / "projects/HTC/configs/htc_tiny.py").model.roi_heads
    for key, lazy_keys in found:
        node = yaml_cfg
        for part in key.split("."):
            node = node[part]
        for name in re.findall(r"`([a-z]\w*(?:\.\w+)*)`(?! for off)", lazy_keys):
            node = lazy_cfg
            *parents, last = name.replace(".N.", ".0.").split(".")
            for part in parents:
                node = node[int(part) if part.isdigit() else part]
            if "add with `+`" in lazy_keys:
                continue
            assert last in node, f"{name} is not in the lazy config"


def test_keys_with_two_names_are_all_listed():
    pairs = {}
    for row in rows("docs/configs.md"):
        left, _, right = row.strip("| ").partition(" | ")
        keys, lazy = re.findall(r"`([A-Z_.]+)`", left), re.findall(r"`([a-z_.]+)`", right)
        pairs.update(zip(lazy, keys))
    assert pairs == LAZY_TO_YAML


def test_citation_file_has_the_version():
    from d2ext.version import __version__

    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert f"## {__version__}" in read("CHANGELOG.md")
