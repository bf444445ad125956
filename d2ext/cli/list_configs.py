"""List the shipped configs of every installed project, with what their first line says: what they
are and, where there is a paper or a release to compare with, the AP that it PUBLISHED."""

import argparse

from tabulate import tabulate

from d2ext.config.find import shipped_configs
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only names with all of these")
    parser.add_argument("--paths", action="store_true", help="where the files are, too")
    return parser


def rows(words: list[str]) -> list[tuple[str, str, str, str]]:
    """Name, kinds, first words and path of every config whose name has all of some words."""
    found = []
    for name, paths in shipped_configs().items():
        if all(word.lower() in name.lower() for word in words):
            kinds = " ".join(path.suffix.removeprefix(".") for path in paths)
            found.append((name, kinds, first_words(paths[0]), str(paths[0])))
    return found


def first_words(path) -> str:
    """The comment that a config begins with, without those that go on."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    return " ".join(words)


def run(args) -> None:
    found = rows(args.words)
    if not found:
        raise UserError(f"no shipped config has '{' '.join(args.words)}' in its name")
    heads = ["config", "kinds", "what it is", "path"]
    columns = len(heads) if args.paths else len(heads) - 1
    widths = [None, None, 60, None][:columns]
    table = [row[:columns] for row in found]
    print(tabulate(table, heads[:columns], maxcolwidths=widths))


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 for a mistake of the user."""
    args = argument_parser().parse_args(arguments)
    return run_guarded(lambda: run(args))
