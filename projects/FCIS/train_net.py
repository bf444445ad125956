#!/usr/bin/env python
"""Train or evaluate Fully Convolutional Instance-aware Segmentation; `--help` shows the options."""

import d2ext.projects.fcis  # noqa: F401
from d2ext.engine import main

if __name__ == "__main__":
    main()
