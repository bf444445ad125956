#!/usr/bin/env python
"""Train or evaluate Hybrid Task Cascade; `--help` shows the options."""

import d2ext.projects.htc  # noqa: F401
from d2ext.engine import main

if __name__ == "__main__":
    main()
