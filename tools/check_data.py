#!/usr/bin/env python
"""`d2ext check`, for those who work in the repository; `--help` shows the options."""

import sys

from d2ext.cli.check import main

if __name__ == "__main__":
    sys.exit(main())
