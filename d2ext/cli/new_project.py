"""Write a project of your own: a package beside this repository with a tiny network that trains,
configs of both kinds and tests. Once installed, it is known to all tools."""

import argparse
import importlib.util
import keyword
import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from d2ext.config import get_cfg, load_projects
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

TEMPLATE = Path(__file__).resolve().parent / "project_template"
_SUFFIX = ".j2"
_OWN_NAMES = {"configs", "tests", "train_net"}  # of other things in the folder of a project


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of the package, e.g. my_network")
    parser.add_argument(
        "--into", required=True, metavar="DIR", help="where its folder NAME is made"
    )
    return parser


def check_name(name: str) -> dict:
    """What the templates call `name`, `cls` and `key`.

    Raises:
        UserError: not a name for a package, or something else has it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"NAME '{name}' cannot be that of a package; take lower-case letters, digits and "
            "underscores, e.g. my_network"
        )
    load_projects()
    key, cls = name.upper(), "".join(part.capitalize() for part in name.split("_"))
    if name in _OWN_NAMES or importlib.util.find_spec(name) is not None:
        taken = "a module of this name"
    elif key in get_cfg().MODEL:
        taken = f"a yaml key MODEL.{key}"
    elif cls in META_ARCH_REGISTRY or f"{cls}ROIHeads" in ROI_HEADS_REGISTRY:
        taken = f"a registered class {cls if cls in META_ARCH_REGISTRY else cls + 'ROIHeads'}"
    else:
        return {"name": name, "cls": cls, "key": key}
    raise UserError(f"NAME '{name}': there is {taken} already; choose another name")


def render(words: dict) -> dict:
    """Path below the project's folder -> text, of all files."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE), undefined=StrictUndefined, keep_trailing_newline=True
    )
    names = environment.list_templates(filter_func=lambda name: name.endswith(_SUFFIX))
    return {
        name.replace("NAME", words["name"]).removesuffix(_SUFFIX): environment.get_template(
            name
        ).render(words)
        for name in names
    }


def write_project(name: str, into: str) -> Path:
    """Write the files of a new project.

    Returns:
        Its folder, `into/name`.

    Raises:
        UserError: see `check_name`; or the folder exists or cannot be made.
    """
    files = render(check_name(name))
    folder = Path(into) / name
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another NAME or --into")
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def run(args) -> None:
    folder = write_project(args.name, args.into)
    print(f"{folder}: {sum(path.is_file() for path in folder.rglob('*'))} files; next:")
    config = folder / args.name / "configs" / f"{args.name}_tiny.yaml"
    for command in (
        ["pip", "install", "--no-build-isolation", "-e", folder],
        ["python", "-m", "pytest", folder],
        ["python", folder / "train_net.py", "--config-file", config],
    ):
        print(" ", shlex.join(map(str, command)))


def main(argv=None) -> int:
    args = argument_parser().parse_args(argv)
    return run_guarded(lambda: run(args))
