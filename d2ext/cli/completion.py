"""Print a script with which a shell completes commands, options, files and names of configs.

d2ext completion bash > ~/.local/share/bash-completion/completions/d2ext
d2ext completion zsh > ~/.zfunc/_d2ext
d2ext completion fish > ~/.config/fish/completions/d2ext.fish

It names the configs that are installed now; write it again after a new project.
"""

import argparse
import importlib
import shlex

from d2ext.config.find import shipped_configs
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

SHELLS = ("bash", "zsh", "fish")
_FOLDERS, _FILES = ("FOLDER", "DIR"), ("FILE", "IMAGE", "MODEL")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def _load_shtab():
    try:
        import shtab
    except ImportError as error:
        raise UserError(
            "completion needs shtab, which is not installed; run pip install shtab"
        ) from error
    return shtab


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    from d2ext.cli.main import COMMANDS

    command = COMMANDS[name]
    parser = importlib.import_module(f"d2ext.cli.{command.module}").argument_parser()
    for action in parser._actions:  # `d2ext split` is a part of another command
        if isinstance(action, argparse._SubParsersAction) and set(command.words) & set(
            action.choices
        ):
            return action.choices[command.words[0]]
    return parser


def completion_script(shell: str) -> str:
    """The script for a shell.

    Args:
        shell: one of `SHELLS`.

    Raises:
        UserError: shtab is not installed.
    """
    from d2ext.cli.main import COMMANDS

    shtab = _load_shtab()
    root = argparse.ArgumentParser(prog="d2ext")
    root.add_argument("--version", action="store_true", help="the version of d2ext")
    commands = root.add_subparsers()
    for name, command in COMMANDS.items():
        parser = command_parser(name)
        _mark(parser, shtab)
        commands.add_parser(name, help=command.help, parents=[parser], add_help=False)
    return shtab.complete(root, shell)


def _mark(parser: argparse.ArgumentParser, shtab) -> None:
    """Say which arguments are files, folders and configs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _mark(part, shtab)
        elif action.dest in ("opts", "config_file"):
            action.complete = _configs(shtab)
        elif str(action.metavar).startswith(_FOLDERS) or action.dest == "output_dir":
            action.complete = shtab.DIRECTORY
        elif str(action.metavar).startswith(_FILES) or action.dest in ("images", "source"):
            action.complete = shtab.FILE


def _configs(shtab) -> dict:
    """Names of shipped configs, and files."""
    names = " ".join(map(shlex.quote, shipped_configs()))
    found = shtab.cmd(f"printf '%s\\n' {names}")
    function = "_d2ext_configs"
    both = f'{function}() {{ compgen -W "{names}" -- $1; compgen -f -- $1; }}'
    found["preamble"] = {**found["preamble"], "bash": both}
    return {**found, "bash": function}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 for a mistake of the user."""
    args = argument_parser().parse_args(arguments)
    return run_guarded(lambda: print(completion_script(args.shell)))
