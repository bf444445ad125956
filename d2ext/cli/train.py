"""Train or evaluate a config, as every `train_net.py` does."""

from d2ext.engine.cli import main as run


def main(arguments: list[str] | None = None) -> int:
    """Command line; ends the program with its status."""
    run(arguments)
    return 0
