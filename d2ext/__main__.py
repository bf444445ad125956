"""The command `d2ext`, also as `python -m d2ext`; without detectron2 one line says so."""

import sys


def main() -> int:
    """Run a command, see `d2ext.cli.main`."""
    try:
        from d2ext.cli.main import main as run
    except ImportError as error:
        if "needs detectron2" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
