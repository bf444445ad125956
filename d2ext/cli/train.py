"""Train or evaluate a config, as every `train_net.py` does."""

import argparse

from d2ext.engine import cli


def argument_parser() -> argparse.ArgumentParser:
    return cli.argument_parser()


def main(arguments: list[str] | None = None) -> int:
    """Command line; ends the program with its status."""
    cli.main(arguments)
    return 0
