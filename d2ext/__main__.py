"""`python -m d2ext` is the command `d2ext`."""

import sys

from d2ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
