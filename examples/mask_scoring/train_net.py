#!/usr/bin/env python
"""Train or evaluate Mask Scoring R-CNN; `--help` shows the options."""

import mask_scoring  # noqa: F401
from d2ext.engine import main

if __name__ == "__main__":
    main()
