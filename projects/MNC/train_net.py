#!/usr/bin/env python
"""Train or evaluate Multi-task Network Cascades; `--help` shows the options."""

import d2ext.projects.mnc  # noqa: F401
from d2ext.engine import main

if __name__ == "__main__":
    main()
