#!/usr/bin/env python
"""`d2ext new-project`, for those who work in the repository; `--help` shows the options."""

import sys

from d2ext.cli.new_project import main

if __name__ == "__main__":
    sys.exit(main())
