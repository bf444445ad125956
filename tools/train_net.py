#!/usr/bin/env python
"""Train or evaluate any config of this repository, of detectron2's baselines too; see `--help`."""

import d2ext  # noqa: F401
from d2ext.engine import main

if __name__ == "__main__":
    main()
