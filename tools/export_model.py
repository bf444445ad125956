#!/usr/bin/env python
"""`d2ext export`, for those who work in the repository; `--help` shows the options."""

import sys

from d2ext.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
