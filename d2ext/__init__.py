"""d2ext: what the projects MNC, FCIS and HTC share on top of detectron2.

Importing this package applies the cheap half of `d2ext.compat` and nothing else, so it must
come before the first `import detectron2.layers` (or `data`, `engine`, ...) of a program.
"""

from d2ext import compat
from d2ext.version import __version__

compat.install()

__all__ = ["__version__", "compat"]
