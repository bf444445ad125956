#!/usr/bin/env python
"""`d2ext predict-job`, for torchrun and those who work in the repository; `--help` shows the
options."""

import sys

from d2ext.cli.predict_job import main

if __name__ == "__main__":
    sys.exit(main())
